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

from aoconvert.environment import version_of
from aoconvert.errors import SourceError
from aoconvert.models import configs
from aoconvert.models.base import ModelPart, Skeleton, build_empty, describe_tensors
from aoconvert.models.conversions import Conversion
from aoconvert.models.own_classes import locate, own_class

if TYPE_CHECKING:
    import torch
    from torch import nn


def model_class(component: ModelPart, *, code_root: Path | None = None) -> Any:
    """The class named in ``architectures`` (or in a pipeline's ``model_index.json``).

    As with the auto classes, code inside the checkpoint goes before transformers' own where it may be run.

    Args:
        component: the component.
        code_root: folder with the checkpoint's own code; only given with ``--trust-remote-code``.

    Raises:
        SourceError: transformers has no such class, or the checkpoint needs its own code, which may not be run or
            cannot be had.
    """
    import transformers

    component = locate(component)
    if component.module is not None:
        return own_class(component, component.module, code_root=code_root)
    reference = _own_code(component)
    if reference is not None and code_root is not None:
        return _dynamic_class(component, reference, code_root)
    cls = getattr(transformers, component.class_name, None)
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls
    if reference is not None:
        raise SourceError(
            f"{component.title}: {component.class_name} is defined by code inside the checkpoint ({reference})",
            hint="read that code, then use --trust-remote-code to run it",
        )
    raise SourceError(
        f"{component.title}: transformers {transformers.__version__} has no model class {component.class_name!r}",
        hint="check architectures in its config.json, or upgrade transformers",
    )


def auto_class(component: ModelPart) -> str | None:
    """The auto class that opens a component by the code inside its checkpoint; ``None`` where it has none."""
    reference = _own_code(component) if component.module is None else None
    if reference is None:
        return None
    return next(str(name) for name, found in component.config["auto_map"].items() if found == reference)


def _own_code(component: ModelPart) -> str | None:
    """Where ``auto_map`` says that the model class is: ``file.Class``, or ``org/repo--file.Class``.

    Some name another class there than in ``architectures``; the auto classes take that of ``auto_map``.
    """
    auto_map = component.config.get("auto_map")
    entries = auto_map.items() if isinstance(auto_map, dict) else ()
    models = {
        reference.rpartition(".")[2]: reference
        for name, reference in entries
        if str(name).startswith("AutoModel") and isinstance(reference, str)
    }
    if component.class_name in models or len(models) != 1:
        return models.get(component.class_name)
    import transformers

    return None if hasattr(transformers, component.class_name) else next(iter(models.values()))


def _dynamic_class(component: ModelPart, reference: str, code_root: Path) -> Any:
    """A class out of the checkpoint's own code, or that of another repo.

    Raises:
        SourceError: the code is not there, or cannot be imported.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    repo, _, _ = reference.rpartition("--")
    try:
        return get_class_from_dynamic_module(reference, str(code_root))
    except Exception as error:  # the Hub's errors, and whatever the code raises while it is imported
        raise SourceError(
            f"{component.title}: its code {reference} cannot be used: {error}".splitlines()[0],
            hint=f"it is in another repo, {repo}: is the network reachable?" if repo else "is the file complete?",
        ) from error


def config_class(component: ModelPart, cls: Any, *, code_root: Path | None = None) -> Any:
    """What reads the component's ``config.json``: the model class's own config class, as in its ``from_pretrained``.

    Raises:
        SourceError: as :func:`model_class`.
    """
    if cls.config_class is not None:
        return cls.config_class
    from transformers import AutoConfig

    reference = (component.config.get("auto_map") or {}).get("AutoConfig")
    if isinstance(reference, str) and code_root is not None:
        return _dynamic_class(component, reference, code_root)
    return AutoConfig


def empty_model(
    component: ModelPart, dtype: torch.dtype, *, code_root: Path | None = None, buffers: bool = False
) -> nn.Module:
    """Build the model on ``meta``, as ``from_pretrained`` does: ``dtype`` is what a class that names none gets.

    With ``buffers`` these are real.

    Raises:
        SourceError: the class does not exist, or does not take this config.
    """
    from transformers.initialization import no_init_weights

    cls = model_class(component, code_root=code_root)
    reader = config_class(component, cls, code_root=code_root)
    with no_init_weights():
        return build_empty(
            component, lambda: cls._from_config(configs.read(component.config, reader), dtype=dtype), buffers=buffers
        )


def skeleton(component: ModelPart, dtype: torch.dtype, *, code_root: Path | None = None) -> Skeleton:
    """The empty model and its tensors. ``dtype`` is what floating tensors will be cast to.

    transformers keeps ``_keep_in_fp32_modules_strict`` in float32 below float32, and ``_keep_in_fp32_modules`` only
    below float16; its own plan for ``dtype`` is asked. What a class makes in float32 whatever the default stays so.
    """
    import torch
    from transformers.core_model_loading import build_glob_alternation

    model: Any = empty_model(component, dtype, code_root=code_root)
    component = configs.own(component, config_class(component, type(model), code_root=code_root))
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
    tied = {name: target for name, target in model.all_tied_weights_keys.items() if name in set(names)}
    described = describe_tensors(
        model,
        tied=tied,
        keep_fp32=keep,
        precise=precise,
        output_heads=_output_heads(model),
        vocabulary=_vocabulary(model),
    )
    return Skeleton(component, model, described, code_root=code_root)


def _output_heads(model: Any) -> frozenset[str]:
    """Names of the layers that transformers itself leaves alone when it quantizes, as far as they give the output.

    Its list has the last parameter of the model, but means nothing where that is a bias: a head on top of a base model
    (``classifier``) is meant there too.
    Source: ``transformers.quantizers.base.get_keys_to_not_convert``.
    """
    from torch import nn
    from transformers.quantizers.base import get_keys_to_not_convert

    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tied = {name.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for name in pair}
    output = model.get_output_embeddings()
    heads = {name for name, module in model.named_modules() if output is not None and module is output}
    for name in get_keys_to_not_convert(model):
        owner = name.removesuffix(".bias")
        if owner == name or (model.base_model is not model and not name.startswith(f"{model.base_model_prefix}.")):
            heads |= {owner} & linear - tied
    return frozenset(heads)


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
        passed: the checkpoint's names that transformers passes over: they lead to a key that another one has given.
    """

    direct: Mapping[str, str]
    merged: frozenset[str]
    conversions: tuple[Conversion, ...]
    clash: str | None
    passed: Mapping[str, str]


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
    passed: dict[str, str] = {}
    collected: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    merged: set[str] = set()
    for name in sorted(checkpoint, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
        if target not in wanted:
            continue
        if pattern is None:
            if direct.setdefault(target, name) != name:
                passed[name] = direct[target]
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
    for name in direct.keys() & collected.keys():  # its parts go before it
        passed[direct[name]] = next(iter(collected[name][1].values()))[0]
    return Names(kept, frozenset(merged & set(wanted)), conversions, clash, passed)


@contextmanager
def quiet() -> Iterator[None]:
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
    component: ModelPart,
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

    cls = model_class(component, code_root=code_root)
    try:
        with quiet():
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
            hint="check that from_pretrained opens it",
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
            f"{component.title}: the offload of transformers {version_of('transformers')} left no index of its weights",
            hint="report this with the model's name",
        )
    return index
