"""Which models of a source are quantized, and which weights files that takes. Imports no torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aoconvert import recipes
from aoconvert.errors import AoconvertError, SourceError
from aoconvert.formats.registry import TORCH_BIN
from aoconvert.models import ModelLayout, ModelPart, identify
from aoconvert.options import QuantizeOptions
from aoconvert.sources.weights import WeightFiles, find_weights

if TYPE_CHECKING:
    from aoconvert.recipes import Recipe
    from aoconvert.sources import Source
    from aoconvert.sources.weights import WeightFiles


def local_weights(source: Source, options: QuantizeOptions) -> list[Path]:
    """Weights files of a folder that will be read, in that order; none where anything is wrong: the plan will say."""
    if source.is_remote:
        return []
    try:
        layout = identify(source, options.subfolder)
        found = []
        for component in choose_components(layout, options, load_recipe(options))[0]:
            weights = chosen_weights(source, component, options.variant)
            found += [source.local(path) for path in weights.files] if weights is not None else []
    except AoconvertError:
        return []
    return found


def unreadable_headers(source: Source, options: QuantizeOptions) -> list[str]:
    """Torch files of a Hub repo whose tensors only the whole file tells: without them there is no exact plan.

    None where anything is wrong: the plan will say.
    """
    if not source.is_remote:
        return []
    try:
        layout = identify(source, options.subfolder)
        models = choose_components(layout, options, load_recipe(options))[0]
        if layout.kind == "pipeline" and not (is_only(layout, options) or options.keep_original_files):
            models = list(layout.components)
        found = (weights_of(source, model, options.variant) for model in models)
        files = [path for weights in found if weights is not None for path in weights.files]
    except AoconvertError:
        return []
    return [path for path in files if TORCH_BIN.writes(path) and not source.is_local(path)]


def weights_of(source: Source, component: ModelPart, variant: str | None) -> WeightFiles | None:
    """A part's weights; like diffusers, those without a variant where the part does not have the one asked for.

    Raises:
        SourceError: as ``find_weights``.
    """
    find = partial(find_weights, source, component.folder, component.library, config=component.config)
    if variant is None:
        return find()
    try:
        return find(variant=variant)
    except SourceError:
        return find()


def chosen_weights(source: Source, component: ModelPart, variant: str | None) -> WeightFiles | None:
    """The weights of a component that is quantized.

    Raises:
        SourceError, HubError: as ``find_weights``; also for a variant that is not there.
    """
    return find_weights(source, component.folder, component.library, variant=variant, config=component.config)


def load_recipe(options: QuantizeOptions) -> Recipe | None:
    """The recipe, where one is given.

    Raises:
        UsageError: it is none, or has a mistake.
    """
    return recipes.load(options.recipe) if options.recipe is not None else None


def choose_components(
    layout: ModelLayout, options: QuantizeOptions, recipe: Recipe | None = None
) -> tuple[list[ModelPart], list[str]]:
    """The components to quantize, and what is wrong with what was asked for.

    ``--component`` says which; else the recipe's sections do; else it is the denoiser.
    """
    problems = []
    known = [item.name for item in layout.components if item.name]
    named = {name: f"{recipe.origin} [component.{name}]" for name in recipe.components} if recipe is not None else {}
    wanted = {name: f"--component {name}" for name in options.components}
    chosen: list[ModelPart] = []
    for name, origin in {**named, **wanted}.items():
        component = layout.component(name) if name else None
        if component is not None:
            if not wanted or name in wanted:
                chosen.append(component)
        elif layout.kind != "pipeline":
            problems.append(f"{origin}: the source is a single model, not a pipeline")
        else:
            problems.append(f"{origin}: the pipeline's models are {', '.join(known)}")
    if not (named or wanted):
        chosen = list(layout.default_components)
        if not chosen:
            problems.append(
                f"the pipeline has no denoiser; choose with --component from {', '.join(known) or 'nothing'}"
            )
    if is_only(layout, options) and len(chosen) > 1:
        problems.append(f"--component-only takes one component, not {len(chosen)}")
    return chosen, problems


def is_only(layout: ModelLayout, options: QuantizeOptions) -> bool:
    """Whether one component of a pipeline is written, and nothing else of it."""
    return options.component_only and layout.kind == "pipeline"
