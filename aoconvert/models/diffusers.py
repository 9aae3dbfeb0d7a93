"""Empty diffusers models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoconvert.cache import remember
from aoconvert.environment import import_diffusers, version_of
from aoconvert.errors import SourceError
from aoconvert.models import base
from aoconvert.models.base import ModelPart, Skeleton, build_empty, describe_tensors, from_json, to_json
from aoconvert.models.own_classes import is_pipeline_module, locate, own_class

if TYPE_CHECKING:
    import torch
    from torch import nn

_PACKAGES = ("diffusers", "transformers", "accelerate", "torch")


def model_class(component: ModelPart, *, code_root: Path | None = None) -> Any:
    """The class named in ``_class_name``, or in a pipeline's ``model_index.json``.

    Args:
        component: the component.
        code_root: folder with the checkpoint's own code; only given with ``--trust-remote-code``.

    Raises:
        SourceError: diffusers has no such model class.
    """
    diffusers = import_diffusers()
    component = locate(component)
    if component.module is not None:
        cls = own_class(component, component.module, code_root=code_root)
    else:
        cls = getattr(diffusers, component.class_name, None)
    if hasattr(cls, "from_pretrained") and not hasattr(cls, "from_config"):
        raise SourceError(
            f"{component.title}: {component.class_name} is a list of models, each in its own folder",
            hint=f"quantize one of them: --subfolder {component.folder}",
        )
    if cls is None or not hasattr(cls, "from_config") or not hasattr(cls, "_keep_in_fp32_modules"):
        raise SourceError(
            f"{component.title}: diffusers {diffusers.__version__} has no model class {component.class_name!r}",
            hint="check _class_name in its config.json, or upgrade diffusers",
        )
    return cls


def empty_model(
    component: ModelPart,
    dtype: torch.dtype | None = None,
    *,
    code_root: Path | None = None,
    buffers: bool = False,
) -> nn.Module:
    """Build the model on ``meta``.

    Args:
        component: the model.
        dtype: what a class that names none gets, as ``from_pretrained`` builds it; float32 if nobody says.
        code_root: as for :func:`model_class`.
        buffers: with real buffers.

    Raises:
        SourceError: the class does not exist, or does not take this config.
    """
    import torch

    cls = model_class(component, code_root=code_root)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype or usual)
    try:
        return build_empty(component, lambda: cls.from_config(dict(component.config)), buffers=buffers)
    finally:
        torch.set_default_dtype(usual)


def list_float32(model: nn.Module) -> frozenset[str]:
    """State-dict keys that stay in float32 for every dtype.

    diffusers matches ``_keep_in_fp32_modules`` against the parts of the parameter's name
    (``load_model_dict_into_meta``).
    """
    wanted = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return frozenset(name for name in model.state_dict() if wanted & set(name.split(".")))


def skeleton(component: ModelPart, *, code_root: Path | None = None) -> Skeleton:
    """Build the empty model, unless its tensors are known from an earlier run."""
    built: Skeleton | None = None
    component = locate(component)

    def make() -> list[dict[str, Any]] | None:
        nonlocal built
        model = empty_model(component, code_root=code_root)
        built = _describe(component, model, code_root)
        renames = any(getattr(module, "_from_deprecated_attn_block", False) for module in model.modules())
        foreign = component.module is not None and not is_pipeline_module(component.module)
        return None if renames or foreign or _is_unreleased() else to_json(built.tensors)

    # building the model takes two seconds of imports; its tensors follow from class, config and versions alone
    known = remember(
        "skeletons",
        {"config": component.config, "class": [component.module, component.class_name], **_versions()},
        make,
    )
    if built is not None:
        return built
    try:
        return Skeleton(component, None, from_json(known), code_root=code_root)
    except (TypeError, KeyError, AttributeError, ValueError):  # damaged
        return _describe(component, empty_model(component, code_root=code_root), code_root)


def _describe(component: ModelPart, model: torch.nn.Module, code_root: Path | None) -> Skeleton:
    keep = list_float32(model)
    described = describe_tensors(model, tied={}, keep_fp32=keep, precise=keep)
    return Skeleton(component, model, described, code_root=code_root)


def _versions() -> dict[str, Any]:
    """What decides how a model is built, this code included."""
    code = [Path(file).read_bytes() for file in (__file__, base.__file__)]
    digests = [hashlib.sha256(text).hexdigest() for text in code]
    return {"versions": {name: version_of(name) for name in _PACKAGES}, "code": digests}


def _is_unreleased() -> bool:
    """A version that does not tell one state of the code from another."""
    return any("dev" in (version_of(name) or "dev") for name in _PACKAGES)


def source_names(skeleton: Skeleton, checkpoint: Iterable[str], *, sharded: bool) -> Mapping[str, str]:
    """State-dict key → the checkpoint's name of that tensor.

    They are the same, except for attention blocks that diffusers renamed before it had sharded checkpoints.
    """
    names = {name: name for name in checkpoint}
    if skeleton.model is None:
        return names
    rename = getattr(skeleton.model, "_fix_state_dict_keys_on_load", None)
    if rename is not None and not sharded:
        rename(names)
    return names
