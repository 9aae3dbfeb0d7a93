"""Which models of a source are quantized, and which weights files that takes. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aoconvert.errors import AoconvertError
from aoconvert.models import Component, ModelLayout, identify
from aoconvert.options import QuantizeOptions
from aoconvert.sources.weights import find_weights

if TYPE_CHECKING:
    from aoconvert.sources import Source


def local_weights(source: Source, options: QuantizeOptions) -> list[Path]:
    """Weights files of a folder that will be read, in that order; none where anything is wrong: the plan will say."""
    if source.kind != "folder":
        return []
    try:
        layout = identify(source, options.subfolder)
        found = []
        for component in choose(layout, options)[0]:
            weights = find_weights(source, component.folder, component.library, variant=options.variant)
            found += [source.local(path) for path in weights.files] if weights is not None else []
    except AoconvertError:
        return []
    return found


def choose(layout: ModelLayout, options: QuantizeOptions) -> tuple[list[Component], list[str]]:
    """The components to quantize, and what is wrong with what was asked for."""
    problems = []
    known = [item.name for item in layout.components if item.name]
    chosen: list[Component] = []
    if options.components:
        for name in options.components:
            component = layout.component(name) if name else None
            if component is not None:
                chosen.append(component)
            elif layout.kind != "pipeline":
                problems.append(f"--component {name}: the source is a single model, not a pipeline")
            else:
                problems.append(f"--component {name}: the pipeline's models are {', '.join(known)}")
    else:
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
