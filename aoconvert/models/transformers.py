"""Empty transformers models, and the checkpoint's tensors under the model's own names.

transformers 5 renames, splits and merges the tensors of many checkpoints while it loads them. Renamed ones are
resolved here with the library's own rules and read from the original file. Those that go through one of its
converters (experts of a mixture are stacked) are made one by one, see ``conversions``. Where that cannot be, the
official loader makes a copy of them on disk and holds no weights (see ``merged_reader_index``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoconvert.errors import SourceError
from aoconvert.models.base import Component, Skeleton, build_empty, describe_tensors
from aoconvert.models.conversions import Conversion

if TYPE_CHECKING:
    import torch
    from torch import nn


def model_class(component: Component, *, code_root: Path | None = None) -> Any:
    """The class named in ``architectures`` (or in a pipeline's ``model_index.json``).

    Args:
        component: the component.
        code_root: folder with the checkpoint's own code; only given with ``--trust-remote-code``.

    Raises:
        SourceError: transformers has no such class, or the checkpoint needs its own code.
    """
    import transformers

    cls = getattr(transformers, component.class_name, None)
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls
    auto_map = component.config.get("auto_map") or {}
    own = {reference.rpartition(".")[2]: reference for reference in auto_map.values() if isinstance(reference, str)}
    if component.class_name in own:
        if code_root is None:
            raise SourceError(
                f"{component.title}: {component.class_name} is code inside the checkpoint",
                hint="read that code, then use --trust-remote-code to run it",
            )
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(own[component.class_name], str(code_root))
    raise SourceError(
        f"{component.title}: transformers {transformers.__version__} has no model class {component.class_name!r}",
        hint="check architectures in its config.json, or upgrade transformers",
    )


def _config(component: Component, code_root: Path | None) -> Any:
    from transformers import AutoConfig

    values = dict(component.config)
    model_type = values.pop("model_type", None)
    if code_root is not None and (values.get("auto_map") or {}).get("AutoConfig"):
        return AutoConfig.from_pretrained(code_root, trust_remote_code=True, local_files_only=True)
    if not isinstance(model_type, str):
        raise SourceError(f"{component.title}: its config.json has no model_type", hint="complete the config")
    return AutoConfig.for_model(model_type, **values)


def empty_model(component: Component, dtype: torch.dtype, *, code_root: Path | None = None) -> nn.Module:
    """Build the model on ``meta``, as ``from_pretrained`` does: ``dtype`` is what a class that names none gets.

    Raises:
        SourceError: the class does not exist, or does not take this config.
    """
    from transformers.initialization import no_init_weights

    cls = model_class(component, code_root=code_root)
    with no_init_weights():
        return build_empty(component, lambda: cls._from_config(_config(component, code_root), dtype=dtype))


def skeleton(component: Component, dtype: torch.dtype, *, code_root: Path | None = None) -> Skeleton:
    """The empty model and its tensors. ``dtype`` is what floating tensors will be cast to.

    transformers keeps ``_keep_in_fp32_modules_strict`` in float32 below float32, and ``_keep_in_fp32_modules`` only
    below float16; its own plan for ``dtype`` is asked. What a class makes in float32 whatever the default stays so.
    """
    import torch
    from transformers.core_model_loading import build_glob_alternation

    model: Any = empty_model(component, dtype, code_root=code_root)
    names = model.state_dict()
    keep = frozenset(name for name, tensor in names.items() if dtype != tensor.dtype == torch.float32)
    plan = model._get_dtype_plan(dtype)
    if plan:
        pattern, _, _ = build_glob_alternation(list(plan))
        keep |= {name for name in names if pattern.search(name)}
    precise = frozenset[str]()
    # in float16 both lists count: whoever wrote them found these layers in need of float32
    if every := model._get_dtype_plan(torch.float16):
        pattern, _, _ = build_glob_alternation(list(every))
        precise = frozenset(name for name in names if pattern.search(name))
    head = model.get_output_embeddings()
    head_name = next((name for name, module in model.named_modules() if head is not None and module is head), None)
    tied = {name: target for name, target in model.all_tied_weights_keys.items() if name in set(names)}
    described = describe_tensors(
        model, tied=tied, keep_fp32=keep, precise=precise, output_head=head_name, vocabulary=_vocabulary(model)
    )
    return Skeleton(component, model, described)


def _vocabulary(model: Any) -> int:
    """Rows of the input embeddings; 0 where they are no table, as those of an image are."""
    from torch import nn

    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return 0
    return table.num_embeddings if isinstance(table, nn.Embedding) else 0


@dataclass(frozen=True)
class Names:
    """Where each tensor of the model comes from.

    Attributes:
        direct: state-dict key → the checkpoint's name of the same tensor.
        merged: state-dict keys that transformers builds from several tensors, or by an operation on one.
        conversions: how it builds them.
        clash: a key that the checkpoint gives in both ways, if there is one.
    """

    direct: Mapping[str, str]
    merged: frozenset[str]
    conversions: tuple[Conversion, ...]
    clash: str | None


def source_names(skeleton: Skeleton, checkpoint: Iterable[str]) -> Names:
    """Resolve the checkpoint's names with transformers' own renaming rules, reading nothing.

    The same steps in the same order as ``transformers.core_model_loading.convert_and_load_state_dict_in_model`` takes
    for a key: experts are stacked in the order they come, and some rules look at the keys before.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    model: Any = skeleton.model
    wanted = model.state_dict()
    prefix = model.base_model_prefix
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    direct: dict[str, str] = {}
    collected: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    merged: set[str] = set()
    for name in sorted(checkpoint, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
        if target not in wanted:
            continue
        if pattern is None:
            direct.setdefault(target, name)
            continue
        _, sources = collected.setdefault(target, (by_pattern[pattern], {}))
        sources.setdefault(pattern, []).append(name)
        # one tensor split into several: the first target stands for all of them
        first, *others = by_pattern[pattern].target_patterns
        merged |= {target, *(target.replace(first, other) for other in others)}
    conversions = tuple(
        Conversion(layer, converter, {pattern: tuple(names) for pattern, names in sources.items()})
        for layer, (converter, sources) in collected.items()
    )
    clash = next((name for name in direct if name in merged), None)
    kept = {name: origin for name, origin in direct.items() if name not in merged}
    return Names(kept, frozenset(merged & set(wanted)), conversions, clash)


@contextmanager
def _quiet() -> Iterator[None]:
    """No loading bars and reports on stderr; the plan has said what matters."""
    from transformers.utils import logging as hf_logging

    bars = hf_logging.is_progress_bar_enabled()
    level = hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity(logging.ERROR)
    accelerate_log = logging.getLogger("accelerate.big_modeling")
    before = accelerate_log.level
    accelerate_log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        accelerate_log.setLevel(before)
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def merged_reader_index(
    component: Component,
    folder: Path,
    scratch: Path,
    dtype: torch.dtype,
    *,
    variant: str | None = None,
    code_root: Path | None = None,
) -> Mapping[str, tuple[Path, str]]:
    """Let transformers' own loader build the merged tensors; state-dict key → (safetensors file, name in it).

    The loader keeps every weight on disk (``device_map={"": "disk"}``): tensors that it only renames stay in the
    checkpoint's files, merged ones are written to ``scratch``, one file each. That costs a second copy of them on
    disk.

    Raises:
        SourceError: the loader refused the checkpoint.
    """
    import torch

    cls = model_class(component, code_root=code_root)
    try:
        with _quiet():
            model = cls.from_pretrained(
                folder,
                device_map={"": "disk"},
                offload_folder=scratch,
                dtype=dtype,
                variant=variant,
                local_files_only=True,
                trust_remote_code=code_root is not None,
            )
    except Exception as error:
        raise SourceError(
            f"{component.title}: transformers could not load the checkpoint: {error}".splitlines()[0],
            hint="does from_pretrained open it?",
        ) from error
    index: dict[str, tuple[Path, str]] = {}
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        weights = getattr(hook, "weights_map", None)
        if weights is None:
            continue
        loader = getattr(weights, "dataset", weights)
        for name, entry in loader.index.items():
            if entry.get("safetensors_file"):
                index[name] = (Path(entry["safetensors_file"]), entry.get("weight_name", name))
        break
    del model
    if not index:
        raise SourceError(
            f"{component.title}: transformers {torch.__name__} offload left no index of its weights",
            hint="report this with the model's name",
        )
    return index
