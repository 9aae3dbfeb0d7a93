"""What the library itself says about a checkpoint's tensors when it opens them, asked without their data.

The library's ``from_pretrained`` gets the checkpoint's ``config.json`` beside a ``.bin`` with the same names, dtypes
and shapes, all on ``meta``, and reports what it misses, what it does not know and what does not fit. So its own lists
(``_keys_to_ignore_on_load_missing``), prefixes, renames, conversions and ties decide, not a reading of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoconvert.cache import remember
from aoconvert.environment import import_diffusers, quiet_imports, version_of
from aoconvert.models import configs
from aoconvert.models.base import ModelPart, SourceTensor

if TYPE_CHECKING:
    import torch

_PACKAGES = ("diffusers", "transformers", "accelerate", "torch")


@dataclass(frozen=True)
class Opening:
    """The library's report. Names are state-dict keys, unless said otherwise.

    Attributes:
        missing: made anew, with a warning: no tensor of the checkpoint is for them.
        unexpected: tensors that the model has no place for, as the library calls them.
        mismatched: key → shape in the checkpoint, shape in the model.
        shared: groups of keys that are one parameter after opening.
        contested: keys that the class declares one (second: where it would take it from), while the checkpoint holds
            both; if their values differ, both are kept.
        refusal: why it does not open the checkpoint at all; then nothing else is known.
    """

    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] = frozenset()
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None
    shared: tuple[tuple[str, ...], ...] = ()
    contested: tuple[tuple[str, str], ...] = ()
    refusal: str | None = None


def ask(
    component: ModelPart,
    dtype: torch.dtype,
    found: Mapping[str, SourceTensor],
    *,
    sharded: bool,
    code_root: Path | None = None,
) -> Opening:
    """Let the library open the checkpoint.

    Args:
        component: the model.
        dtype: what floating tensors are cast to.
        found: the checkpoint's tensors by name.
        sharded: they come with an index: diffusers then knows no old names.
        code_root: folder with the checkpoint's own code; only given with ``--trust-remote-code``.

    Raises:
        SourceError: there is no such class.
    """

    def make() -> dict[str, Any] | None:
        return _to_json(_open(component, dtype, found, sharded=sharded, code_root=code_root))

    if code_root is not None or _is_unreleased():  # code that no version tells apart
        return _from_json(make())
    facts = {
        "class": [component.library, component.module, component.class_name],
        "config": component.config,
        "dtype": str(dtype),
        "tensors": [[tensor.name, str(tensor.dtype), tensor.shape] for tensor in found.values()],
        "sharded": sharded,
        "versions": {name: version_of(name) for name in _PACKAGES},
        "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    try:
        return _from_json(remember("openings", facts, make))
    except (TypeError, KeyError, AttributeError, ValueError):  # damaged
        return _from_json(make())


def _is_unreleased() -> bool:
    return any("dev" in (version_of(name) or "dev") for name in _PACKAGES)


def _to_json(opening: Opening) -> dict[str, Any]:
    return {**asdict(opening), "missing": sorted(opening.missing), "unexpected": sorted(opening.unexpected)}


def _from_json(values: Any) -> Opening:
    mismatched = {str(name): (tuple(here), tuple(there)) for name, (here, there) in values["mismatched"].items()}
    return Opening(
        missing=frozenset(values["missing"]),
        unexpected=frozenset(values["unexpected"]),
        mismatched=mismatched,
        shared=tuple(tuple(group) for group in values["shared"]),
        contested=tuple((name, other) for name, other in values["contested"]),
        refusal=values["refusal"],
    )


def _open(
    component: ModelPart,
    dtype: torch.dtype,
    found: Mapping[str, SourceTensor],
    *,
    sharded: bool,
    code_root: Path | None,
) -> Opening:
    open_with = _open_diffusers if component.library == "diffusers" else _open_transformers
    with configs.write_folder(component.config) as folder:
        try:
            return open_with(component, dtype, found, folder, sharded, code_root)
        except Exception as error:  # each class has its own way to refuse
            return Opening(mismatched={}, refusal=str(error).strip().partition("\n")[0] or type(error).__name__)


def _save(found: Mapping[str, SourceTensor], file: Path, *, sharded: bool) -> None:
    """The same names, dtypes and shapes, and no data."""
    import torch

    torch.save({name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in found.items()}, file)
    if sharded:
        index = {"metadata": {}, "weight_map": dict.fromkeys(found, file.name)}
        file.with_name(f"{file.name}.index.json").write_text(json.dumps(index), encoding="utf-8")


def _open_diffusers(
    component: ModelPart,
    dtype: torch.dtype,
    found: Mapping[str, SourceTensor],
    folder: Path,
    sharded: bool,
    code_root: Path | None,
) -> Opening:
    import torch

    from aoconvert.models.diffusers import model_class

    cls = model_class(component, code_root=code_root)
    _save(found, folder / "diffusion_pytorch_model.bin", sharded=sharded)
    diffusers = import_diffusers()
    level = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)  # it logs as errors what it then does
    opened = partial(
        cls.from_pretrained,
        folder,
        device_map={"": "meta"},
        torch_dtype=dtype,
        output_loading_info=True,
        use_safetensors=False,
        local_files_only=True,
    )
    try:
        try:
            with torch.device("meta"):  # tables of positions, too: a video model's take more than its largest weight
                model, report = opened()
        except (RuntimeError, NotImplementedError):  # a class whose __init__ looks at values
            model, report = opened()
    finally:
        diffusers.logging.set_verbosity(level)
    shared = _find_shared(model)
    there = {name for group in shared if not set(group) <= set(report["missing_keys"]) for name in group}
    return Opening(
        missing=frozenset(report["missing_keys"]) - there,  # set through the other name
        unexpected=frozenset(report["unexpected_keys"]),
        mismatched=_shapes(report["mismatched_keys"]),
        shared=shared,
    )


def _open_transformers(
    component: ModelPart,
    dtype: torch.dtype,
    found: Mapping[str, SourceTensor],
    folder: Path,
    sharded: bool,
    code_root: Path | None,
) -> Opening:
    from aoconvert.models.transformers import config_class, model_class, quiet

    cls = model_class(component, code_root=code_root)
    config = configs.read(component.config, config_class(component, cls, code_root=code_root))
    _save(found, folder / "pytorch_model.bin", sharded=False)
    from transformers import PreTrainedModel

    with quiet(), quiet_imports():
        # a class's own from_pretrained may not pass the report on; what it adds is not about the weights
        model, report = PreTrainedModel.from_pretrained.__func__(
            cls,
            folder,
            config=config,
            device_map={"": "meta"},
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
        )
    missing = set(report["missing_keys"])
    shared = _find_shared(model)
    same = {name: group for group in shared for name in group}
    contested = [
        (name, origin)
        for name, origin in model.all_tied_weights_keys.items()
        if same.get(name) is None or same[name] is not same.get(origin)
    ]
    return Opening(
        missing=frozenset(missing),
        unexpected=frozenset(report["unexpected_keys"]),
        mismatched=_shapes(report["mismatched_keys"]),
        shared=shared,
        contested=tuple(pair for pair in contested if not missing & set(pair)),
    )


def _find_shared(model: Any) -> tuple[tuple[str, ...], ...]:
    """Names of parameters that are one object."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _shapes(entries: Any) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    return {name: (tuple(here), tuple(there)) for name, here, there in entries}
