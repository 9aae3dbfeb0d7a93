"""Which torchao can load a checkpoint, and which wrote it.

Three sources, from the widest to the narrowest: where every name in the pickle was in which release (measured, see
``release_names``); what a class kept of itself in which release (``SIGNATURES``); and what loads but computes something
else (``_LIMITS``). Layouts that only one device can use are in ``LAYOUTS``. Nothing here imports torch or torchao.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from packaging.version import Version

from aoconvert.formats.torch_bin.contents import BinTensor, Instance
from aoconvert.inspection.release_names import RELEASES, TABLE
from aoconvert.inspection.types import Loading

Range = tuple[int, int]
"""Places in ``RELEASES``, both included."""

ALL: Range = (0, len(RELEASES) - 1)
_NOWHERE: Range = (len(RELEASES), -1)


@dataclass(frozen=True)
class ReleaseSupport:
    """The columns of ``release_names.TABLE``; ``None`` is never."""

    present: Range | None
    written: Range | None
    registered: Range | None
    imported: Range | None


@dataclass(frozen=True)
class PackedLayout:
    """What packed weights are made for.

    Attributes:
        device: the only device type that can use them.
        min_capability: CUDA compute capability.
        note: what to know first.
        packed: the bytes are laid out for the device; otherwise only the product with them needs it.
    """

    device: str
    min_capability: tuple[int, int] | None = None
    note: str | None = None
    packed: bool = True


_CUDA_8 = PackedLayout("cuda", (8, 0))
_MACHINE = (
    "the packing depends on the machine that packed it (AVX512, AVX2 or neither), and the file does not say which"
)

# Sources: `get_device_capability()[0] >= 8` in marlin_sparse_layout, marlin_qqq_tensor, int4_tile_packed_to_4d_tensor;
# the device asserts of float8_opaque_tensor; shared facts "legacy-checkpoints" (int4 packing, HQQ) and "ecosystem"
# (tile_packed_to_4d, plain_int32, da8w4). Where torchao asserts no capability, none is claimed.
LAYOUTS: Mapping[str, PackedLayout] = {
    "TensorCoreTiledAQTLayout": _CUDA_8,
    "TensorCoreTiledAQTTensorImpl": _CUDA_8,
    "Int4TilePackedTo4dTensor": _CUDA_8,
    "MarlinSparseAQTLayout": _CUDA_8,
    "MarlinSparseAQTTensorImpl": _CUDA_8,
    "MarlinQQQAQTTensorImpl": _CUDA_8,
    "SemiSparseAQTLayout": PackedLayout("cuda"),
    "SemiSparseAQTTensorImpl": PackedLayout("cuda"),
    "CutlassSemiSparseTensorImpl": PackedLayout("cuda"),
    "Int4PackedTensorImpl": PackedLayout("cuda"),
    "Int4PreshuffledTensor": PackedLayout("cuda"),
    "Int4Tensor": PackedLayout("cuda", note="torchao 0.18 runs it with the package mslk"),
    "Int4CPUAQTTensorImpl": PackedLayout(
        "cpu", note=f"{_MACHINE}; torchao 0.8 and 0.9 wrote broken weights in this layout when HQQ was on"
    ),
    "Int4OpaqueTensor": PackedLayout("cpu", note=_MACHINE),
    "DA8W4CPUAQTTensorImpl": PackedLayout("cpu", note="its kernels are not in the wheels on PyPI"),
    "Float8OpaqueTensor": PackedLayout("cpu"),
    "Int4XPUAQTTensorImpl": PackedLayout("xpu"),
    "Int4PlainInt32Tensor": PackedLayout("xpu", note="for XPU, or NPU"),
}
"""By the last component of a tensor class's name; every other layout can be used on any device."""

# What a tensor of the class holds (inner tensors and attributes, `dtype` and `shape` left out), by releases. Source:
# `tensor_data_names` and its like of the released classes, measured together with `release_names`.
SIGNATURES: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "Int8Tensor": (
        ("0.15.0", "0.15.0", "qdata scale block_size act_quant_kwargs"),
        ("0.16.0", "0.16.0", "qdata scale block_size act_quant_kwargs act_quant_scale act_pre_scale"),
        (
            "0.17.0",
            "0.17.0",
            "qdata scale zero_point block_size act_quant_kwargs act_quant_scale act_quant_zero_point act_pre_scale",
        ),
        (
            "0.18.0",
            "0.18.0",
            "qdata scale zero_point block_size act_quant_kwargs act_quant_scale act_quant_zero_point act_pre_scale "
            "reduce_range",
        ),
    ),
    "Float8Tensor": (
        (
            "0.13.0",
            "0.13.0",
            "qdata scale block_size mm_config hp_value_lb hp_value_ub act_quant_kwargs kernel_preference",
        ),
        ("0.14.1", "0.18.0", "qdata scale block_size mm_config act_quant_kwargs kernel_preference"),
    ),
    "Int4Tensor": (
        ("0.13.0", "0.13.0", "qdata scale zero_point block_size"),
        ("0.14.1", "0.16.0", "qdata scale zero_point act_pre_scale block_size"),
        ("0.17.0", "0.18.0", "qdata scale zero_point act_pre_scale block_size activation_dtype"),
    ),
    "MXTensor": (
        (
            "0.13.0",
            "0.14.1",
            "qdata _scale_e8m0 _elem_dtype _block_size _orig_dtype _gemm_kernel_choice _pack_fp6 act_quant_kwargs",
        ),
        (
            "0.15.0",
            "0.15.0",
            "qdata scale _elem_dtype block_size _orig_dtype kernel_preference act_quant_kwargs _is_swizzled_scales",
        ),
        (
            "0.16.0",
            "0.18.0",
            "qdata scale elem_dtype block_size orig_dtype kernel_preference act_quant_kwargs is_swizzled_scales",
        ),
    ),
    "NVFP4Tensor": (
        (
            "0.13.0",
            "0.14.1",
            "qdata _scale_e4m3 _per_tensor_scale _act_per_tensor_scale _block_size _orig_dtype _is_swizzled_scales "
            "use_triton_kernel act_quant_kwargs",
        ),
        (
            "0.15.0",
            "0.15.0",
            "qdata scale per_tensor_scale act_per_tensor_scale block_size _orig_dtype _is_swizzled_scales "
            "use_triton_kernel act_quant_kwargs",
        ),
        (
            "0.16.0",
            "0.18.0",
            "qdata scale per_tensor_scale act_per_tensor_scale block_size orig_dtype is_swizzled_scales "
            "use_triton_kernel act_quant_kwargs",
        ),
    ),
}
# Their attributes were renamed: another release unpickles them and then misses what it needs (measured).
_STRICT = frozenset({"MXTensor", "NVFP4Tensor"})

# torchao.prototype.safetensors: the release that first took the class (shared facts "anchors", finding 8), and where an
# older one fails on what a newer one writes (shared facts "ecosystem": Int8Tensor by 0.18 in 0.16 and 0.17).
SAFETENSORS_SINCE: Mapping[str, str] = {
    "Float8Tensor": "0.15.0",
    "Int4Tensor": "0.15.0",
    "Int4TilePackedTo4dTensor": "0.15.0",
    "IntxUnpackedToInt8Tensor": "0.15.0",
    "Int8Tensor": "0.16.0",
    "Int4PlainInt32Tensor": "0.16.0",
    "MXTensor": "0.17.0",
    "NVFP4Tensor": "0.17.0",
}


@functools.cache
def fates() -> Mapping[str, ReleaseSupport]:
    """``release_names.TABLE`` by dotted name."""
    found: dict[str, ReleaseSupport] = {}
    module = ""
    for line in TABLE.strip("\n").splitlines():
        if not line.startswith(" "):
            module = line
            continue
        present, written, registered, imported, *names = line.split()
        fate = ReleaseSupport(_range(present), _range(written), _range(registered), _range(imported))
        found |= {f"{module}.{name}": fate for name in names}
    return found


def loading(names: Iterable[str], tensors: Iterable[BinTensor]) -> Loading:
    """Which torchao loads a ``.bin`` and computes the right values.

    Args:
        names: the dotted names in its pickle.
        tensors: its tensors of torchao classes.
    """
    ours = sorted(name for name in set(names) if name.startswith("torchao."))
    low, high = ALL
    limits = [(name, _present(name)) for name in ours]
    limits += [limit for tensor in tensors for limit in _limits(tensor)]
    first: dict[int, str] = {}
    last: dict[int, str] = {}
    for reason, (begin, end) in limits:
        first.setdefault(begin, reason)
        last.setdefault(end, reason)
        low, high = max(low, begin), min(high, end)
    unheard = [name for name in ours if _present(name) == _NOWHERE]
    if unheard:
        why = [f"{name} is in no release of torchao that is known here" for name in unheard]
        return Loading(None, None, tuple(why), possible=False)
    why = []
    if low > ALL[0]:
        why.append(_sentence(first[low], f"is not in torchao before {short(low)}"))
    if high < ALL[1]:
        why.append(_sentence(last[high], f"is not in torchao {short(high + 1)} or later"))
    if low > high:
        return Loading(None, None, tuple(why), possible=False)
    best, (allowed, imports) = _easiest(set(names), low, high)
    return Loading(
        short(low), None if high == ALL[1] else short(high), tuple(why), RELEASES[best], tuple(imports), tuple(allowed)
    )


def _easiest(names: set[str], low: int, high: int) -> tuple[int, tuple[list[str], list[str]]]:
    """The release that asks for the least before loading, the newest of them: names to allow, modules to import."""

    def asks(place: int) -> tuple[list[str], list[str]]:
        found = [(name, fates()[name]) for name in sorted(names) if name in fates()]
        missing = [(name, fate) for name, fate in found if not _covers(fate.registered, place)]
        imports = sorted({name.rpartition(".")[0] for name, fate in missing if _covers(fate.imported, place)})
        allowed = [name for name, fate in missing if not _covers(fate.imported, place)]
        return allowed + sorted(names & {"functools.partial"}), imports

    places = range(low, high + 1)
    best = min(places, key=lambda place: (*(len(part) for part in asks(place)), -place))
    return best, asks(best)


def loading_safetensors(classes: Iterable[str]) -> Loading:
    """Which torchao loads torchao's own safetensors with these classes (last components)."""
    first = 0
    why: list[str] = []
    for name in sorted(set(classes)):
        since = SAFETENSORS_SINCE.get(name)
        if since is None:
            return Loading(None, None, (f"{name} is in no known release's safetensors format",), possible=False)
        if RELEASES.index(since) > first:
            first = RELEASES.index(since)
            why = [f"torchao's safetensors format takes {name} since {short(first)}"]
    return Loading(short(first), None, tuple(why))


def written(names: Iterable[str], tensors: Iterable[BinTensor]) -> Range | None:
    """The releases that can have written such a pickle; ``None`` where none can (or no torchao name is in it)."""
    ours = [name for name in names if name.startswith("torchao.")]
    low, high = ALL
    for name in ours:
        span = fates()[name].written if name in fates() else None
        low, high = max(low, (span or ALL)[0]), min(high, (span or ALL)[1])
    for tensor in tensors:
        for part in parts(tensor):
            span = _signature(part)
            low, high = max(low, (span or ALL)[0]), min(high, (span or ALL)[1])
    return (low, high) if ours and low <= high else None


def parts(tensor: BinTensor) -> Iterable[BinTensor]:
    """The tensor and the torchao tensors within it, outermost first."""
    if tensor.class_name.startswith("torchao."):
        yield tensor
        for inner in tensor.inner.values():
            yield from parts(inner)


def layout_of_classes(classes: Iterable[str]) -> PackedLayout | None:
    """The first layout that only one device can use, by the last components of class names."""
    return next((LAYOUTS[name] for name in sorted(classes) if name in LAYOUTS), None)


def short(place: int) -> str:
    """A release as people write it: ``0.17`` for every patch release of 0.17, ``0.14.1`` where it began there."""
    return RELEASES[place].removesuffix(".0")


def fits(version: str, span: Loading) -> bool | None:
    """Whether an installed torchao is inside the range; ``None`` when it is newer than all that is known here."""
    installed = Version(version)
    if not span.possible:
        return False
    if span.minimum is not None and Version(installed.base_version) < Version(span.minimum):
        return False
    if span.maximum is not None:
        return installed.release[:2] <= Version(span.maximum).release[:2]
    return None if installed.release[:2] > Version(RELEASES[-1]).release[:2] else True


def _range(text: str) -> Range | None:
    if text == "-":
        return None
    first, _, last = text.partition(":")
    return RELEASES.index(first), RELEASES.index(last)


def _present(name: str) -> Range:
    fate = fates().get(name)
    return (fate.present if fate is not None else None) or _NOWHERE


def _covers(span: Range | None, place: int) -> bool:
    return span is not None and span[0] <= place <= span[1]


def _sentence(reason: str, outcome: str) -> str:
    """A reason that is a name needs a verb; one that is a sentence does not."""
    return reason if " " in reason else f"{reason} {outcome}"


def _signature(tensor: BinTensor) -> Range | None:
    """The releases whose class holds exactly what this tensor holds; ``None`` where that is not known."""
    held = (set(tensor.inner) | set(tensor.attributes)) - {"dtype", "shape"}
    known = SIGNATURES.get(tensor.class_name.rpartition(".")[2], ())
    spans = [
        (RELEASES.index(first), RELEASES.index(last)) for first, last, names in known if set(names.split()) == held
    ]
    return spans[0] if spans else None


def _limits(tensor: BinTensor) -> Iterable[tuple[str, Range]]:
    """What a tensor's own fields demand, beyond its class being there."""
    for part in parts(tensor):
        name = part.class_name.rpartition(".")[2]
        if name in _STRICT and (span := _signature(part)) is not None:
            yield f"the fields of {name} were named so only in torchao {short(span[0])} to {short(span[1])}", span
        if name == "Int8Tensor" and (what := _needs_017(part)):
            yield f"{what} is computed rightly since torchao 0.17", (RELEASES.index("0.17.0"), ALL[1])
        if name in ("Float8AQTTensorImpl", "Float8AQTLayout") and _row_scale(part):
            span = (0, RELEASES.index("0.11.0"))
            yield f"{name} with one scale a row loads in torchao 0.12 and later, but not its values", span


def _needs_017(tensor: BinTensor) -> str | None:
    """Measured by aoconvert: 0.15 and 0.16 load these Int8Tensors without an error."""
    block = tensor.attributes.get("block_size")
    kwargs = tensor.attributes.get("act_quant_kwargs")
    if (
        isinstance(block, tuple)
        and block
        and len(block) == len(tensor.shape)
        and block[-1] not in (tensor.shape[-1], -1)
    ):
        return "an Int8Tensor with a scale a group"
    if isinstance(kwargs, Instance):
        mapping = kwargs.state.get("mapping_type")
        if isinstance(mapping, Instance) and mapping.args == (3,):  # MappingType.ASYMMETRIC
            return "an Int8Tensor with asymmetric activations"
    return None


def _row_scale(tensor: BinTensor) -> bool:
    """One dimension: torchao expects two since 0.12 (measured: dequantize fails, or mixes rows and columns)."""
    scale = tensor.inner.get("scale")
    return scale is not None and len(scale.shape) == 1
