"""Model classes that are not in a library's top level: a pipeline's own, and code inside the checkpoint."""

from __future__ import annotations

import contextlib
import pkgutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from aoconvert.cache import remember
from aoconvert.environment import import_diffusers, version_of
from aoconvert.errors import SourceError
from aoconvert.models.base import ModelPart


def is_pipeline_module(name: str) -> bool:
    """Whether a module of diffusers' pipelines has that name."""
    import_diffusers()
    from diffusers import pipelines

    return hasattr(pipelines, name)


def locate(component: ModelPart) -> ModelPart:
    """The component with the pipeline module that its class is in, where nobody has named one.

    A part that is a source of its own has no model_index.json to name it.
    """
    if component.module is not None:
        return component
    facts = [component.library, component.class_name, *map(version_of, ("diffusers", "transformers"))]
    module = remember("modules", facts, lambda: {"module": _module(component)}).get("module")
    return replace(component, module=module)


def _module(component: ModelPart) -> str | None:
    """The pipeline module that a class is in; ``None`` where it is in its library's top level, or nowhere."""
    if hasattr(_library(component), component.class_name):
        return None
    import_diffusers()
    from diffusers import pipelines

    for info in pkgutil.iter_modules(pipelines.__path__):
        with contextlib.suppress(Exception):  # a lazy module of a package that is not installed
            if info.ispkg and hasattr(getattr(pipelines, info.name), component.class_name):
                return info.name
    return None


def _library(component: ModelPart) -> Any:
    """The library of a component alone: a model of transformers does not wait for diffusers to be imported."""
    if component.library == "diffusers":
        return import_diffusers()
    import transformers

    return transformers


def own_class(component: ModelPart, module: str, *, code_root: Path | None = None) -> Any:
    """The class that ``component.module`` stands for, found by diffusers itself.

    Args:
        component: the part.
        module: its ``module``, which not every part has.
        code_root: the part's folder with its own code; only given with ``--trust-remote-code``.

    Raises:
        SourceError: there is none, or it is code inside the checkpoint that may not be run.
    """
    diffusers = import_diffusers()
    from diffusers import pipelines
    from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, get_class_obj_and_candidates

    try:
        found, _ = get_class_obj_and_candidates(
            module,
            component.class_name,
            ALL_IMPORTABLE_CLASSES,
            pipelines,
            is_pipeline_module(module),
            component_name=code_root.name if code_root is not None else None,
            cache_dir=str(code_root.parent) if code_root is not None else None,
            trust_remote_code=code_root is not None,
        )
    except Exception as error:  # whatever diffusers, or the code that it imports, raises
        known = is_pipeline_module(module) or code_root is not None
        code = "if its code is inside the checkpoint, read that code, then use --trust-remote-code"
        raise SourceError(
            f"{component.title}: diffusers {diffusers.__version__} finds no {component.class_name!r} in {module!r}",
            hint="upgrade diffusers" if known else code,
        ) from error
    return found


def is_model(library: str, class_name: str) -> bool | None:
    """Whether an entry of model_index.json names a class with weights; ``None`` where diffusers does not find it."""
    import_diffusers()
    from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
    from torch import nn

    try:
        found = simple_get_class_obj(library, class_name)
    except Exception:  # whatever an import raises
        return None
    return isinstance(found, type) and issubclass(found, nn.Module)
