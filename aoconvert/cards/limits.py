"""Known limits: only those that are true for the checkpoint at hand. Each says where it was seen.

Sources: measured with torch 2.13, torchao 0.18, diffusers 0.42.1, transformers 5.23; diffusers' torchao_quantizer and
group_offloading; transformers' quantizer_torchao; peft's tuners/lora/torchao.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from aoconvert.cards.layers import role
from aoconvert.cards.markdown import Md, code, text
from aoconvert.cards.reproduce import ranges
from aoconvert.checkpoint.checkpoint import Checkpoint
from aoconvert.checkpoint.manifest import ComponentEntry, Manifest, TensorEntry
from aoconvert.checkpoint.report import Strategy
from aoconvert.inspection.compat import short
from aoconvert.inspection.release_names import RELEASES
from aoconvert.schemes import int4
from aoconvert.schemes.table import SchemeEntry, catalogue
from aoconvert.schemes.table.entry import TOKEN, WHOLE_INPUT
from aoconvert.schemes.tensor_classes import CLASSES, class_named

_DTYPE = (
    "keep `torch_dtype`: without it diffusers opens every unquantized tensor in float32, and the first forward "
    "pass fails."
)
_ASSIGN = "`from_pretrained` alone does not open this checkpoint; the code above does."
_BIN = (
    "a `.bin` names torchao's own classes, and torchao releases remove old ones{known}. Keep the pinned versions for "
    "as long as it has to load."
)
_SAFETENSORS = (
    "torchao's safetensors are in its `prototype` namespace, and a release reads only the fields that it knows{known}. "
    "`aoconvert convert --format bin` makes `.bin` files of the same weights, which more releases load."
)
_BYTES = "torchao stores each of these values in a whole byte: the file is not smaller than an int8 file."
_UNCONFIRMED = "unconfirmed: {why}. Run `aoconvert verify` on such a device to find out."
_ONE_CPU = (
    "PyTorch packs 4-bit weights for the vector instructions of the CPU, here {layout}; on a CPU with other vector "
    "instructions they load and give wrong numbers. `aoconvert verify` detects this; `aoconvert repack "
    "--layout-device cpu` packs them again."
)
_ZEROS = (
    "torchao computes no valid scale for values that are all zero and would turn them into NaN. {count} such {rows} "
    "given a valid scale, and load as zeros."
)
_ZERO_INPUT = (
    "torchao computes no valid scale for float8 activations that are all zero either: {what} of zeros, such as one "
    "that is masked "
    "out, becomes NaN."
)
_EAGER = (
    "`config.json` asks for `experts_implementation: eager`, which loops over the experts. transformers' default, "
    "one product for all experts, cannot multiply these weights."
)
_EMBEDDINGS = "the embedding tables are quantized too{shared}."
_UNTIED = "the output head was tied to the embedding table in the source, and is a separate tensor here."
_CARRIED = (
    "the model class does not know {names}: {are} in the weights file as in the source, for loaders that use {them}. "
    "`from_pretrained` ignores {them}."
)
_ORIGINAL = (
    "the source was quantized already ({method}: {how}). {by} gave its values back before they were quantized again: "
    "what the first quantization lost is lost here too, and the errors stated here are to those values."
)
_CARRIED_CODES = (
    "the source was quantized already ({method}: {how}). {carried} of its {tensors} quantized tensors keep the codes "
    "and scales of the source, bit for bit; any others were quantized again. The errors stated here are to the values "
    "that {by} gives."
)
_DROPPED = "the source's weights files also hold {names}, left out here."
_MISSING = "the source does not hold {names}: {library} {makes} {them} when it opens the model, as with the source."
_FUSED = (
    "query, key and value projections are one layer each. `from_pretrained` alone builds separate layers; adapters "
    "for the model with separate projections do not fit."
)
_LORA = (
    "adapters need peft and torchao 0.16 or later. Merging or fusing an adapter dequantizes the weights, adds "
    "it, and quantizes them again."
)
_OFFLOAD_TRANSFORMERS = "transformers refuses a `device_map` that puts part of the model on disk."
_OFFLOAD_DIFFUSERS = (
    "diffusers refuses a `device_map` that puts part of the quantized model on the CPU or on disk, and group offload "
    "to disk."
)
_CODE = (
    "its class is defined by code inside this repo, and `trust_remote_code=True` runs that code on your machine: "
    "read it first."
)
_BOT = "a bot of the Hub may offer a safetensors variant of these weights. It loses the quantization: do not merge it."


def limits(target: Checkpoint, manifest: Manifest, strategy: Strategy) -> list[dict[str, Md]]:
    """``title`` and ``text`` of each."""
    return [{"title": Md(title), "text": Md(line)} for title, line in _limits(target, manifest, strategy)]


def _limits(target: Checkpoint, manifest: Manifest, strategy: Strategy) -> Iterable[tuple[str, str]]:
    components = manifest.components
    tensors = [tensor for entry in components for tensor in entry.tensors if tensor.action == "quantize"]
    classes = {class_named(tensor.class_name).name for tensor in tensors}
    used = [known for name, known in CLASSES.items() if name in classes]
    entries = _entries(tensors)
    if target.kind == "pipeline":
        yield "dtype", _DTYPE
    if strategy == "assign":
        yield "loading", _ASSIGN
    if target.runs_code:
        yield "code", _CODE
    yield from (("casting", known.casting) for known in used if known.casting is not None)
    for format_, said in (("bin", _BIN), ("safetensors", _SAFETENSORS)):
        entries_of = [entry for entry in components if entry.format == format_]
        spans = {span for entry in entries_of if (span := ranges(entry.loads_with).get("torchao")) is not None}
        needs = ", ".join(text(span.replace(">=", "≥ ")) for span in sorted(spans))
        known = f" (torchao {needs}; {short(len(RELEASES) - 1)} is the newest that aoconvert knows)" if needs else ""
        if entries_of:
            yield "torchao", said.format(known=known)
    if any(known.byte_per_value for known in used) or any(entry.padded for entry in entries):
        yield "size", _BYTES
    yield from _of_layout(components)
    yield from _of_layers(target, manifest, tensors, {entry.zero_input for entry in entries} - {None})
    yield from _of_source(components)
    yield "LoRA", _LORA
    if target.kind == "transformers":
        yield "offload", _OFFLOAD_TRANSFORMERS
        if all("/" not in file for part in target.parts for file in part.files):
            yield "pull requests", _BOT
    else:
        yield "offload", _OFFLOAD_DIFFUSERS


def _of_layout(components: Sequence[ComponentEntry]) -> Iterable[tuple[str, str]]:
    for layout in [entry.layout for entry in components]:
        if layout.unconfirmed is not None:
            yield "layout", _UNCONFIRMED.format(why=text(layout.unconfirmed))
        if (cpu := int4.cpu_layout(layout.packing)) is not None:
            yield "one kind of CPU", _ONE_CPU.format(layout=code(cpu))


def _entries(tensors: Sequence[TensorEntry]) -> list[SchemeEntry]:
    """What the catalogue says of the tensors' schemes."""
    names = {tensor.scheme for tensor in tensors}
    return [entry for entry in catalogue() if entry.name in names]


def _of_layers(
    target: Checkpoint, manifest: Manifest, tensors: Sequence[TensorEntry], zeros: Set[str | None]
) -> Iterable[tuple[str, str]]:
    if repaired := sum(tensor.repaired_rows for tensor in tensors):
        yield "zeros", _ZEROS.format(count=repaired, rows="row was" if repaired == 1 else "rows were")
    if zeros:  # the smallest that is lost
        yield "zeros in the input", _ZERO_INPUT.format(what=TOKEN if TOKEN in zeros else WHOLE_INPUT)
    if any(part.config.get("experts_implementation") == "eager" for part in target.parts):
        yield "experts", _EAGER
    if any(role(tensor) == "embedding" for tensor in tensors):
        names = {tensor.name for tensor in tensors}
        tied = any(
            tensor.action == "tied" and tensor.name not in names
            for entry in manifest.components
            for tensor in entry.tensors
        )
        yield "embeddings", _EMBEDDINGS.format(shared=", with the output head that is tied to them" if tied else "")
    if "--untie" in manifest.run.command.split():
        yield "ties", _UNTIED
    if target.fused:
        yield "fused", _FUSED


def _of_source(components: Sequence[ComponentEntry]) -> Iterable[tuple[str, str]]:
    """How the source was quantized, what its weights files hold beside the model's tensors, and what they lack."""
    originals = (entry.original for entry in components if entry.original is not None)
    for original in dict.fromkeys(original for original in originals if original.tensors):
        values = {"method": original.method, "how": original.how, "by": original.dequantized_by}
        counts = {"carried": original.carried, "tensors": original.tensors}
        said = _CARRIED_CODES if original.carried else _ORIGINAL
        yield "a quantized original", said.format(**{key: text(value) for key, value in values.items()}, **counts)
    carried = [tensor.name for entry in components for tensor in entry.tensors if tensor.action == "carry"]
    if carried:
        one = len(carried) == 1
        words = {"are": "it is" if one else "they are", "them": "it" if one else "them"}
        yield "unknown tensors", _CARRIED.format(names=_names(carried), **words)
    if dropped := [item.name for entry in components for item in entry.dropped]:
        yield "left out", _DROPPED.format(names=_names(dropped))
    for entry in components:
        if missing := [item.name for item in entry.missing]:
            them = "it" if len(missing) == 1 else "them"
            makes, them = ("initializes", them) if entry.library == "transformers" else ("gives", f"{them} no values")
            yield (
                "missing tensors",
                _MISSING.format(names=_names(missing), library=entry.library, makes=makes, them=them),
            )


def _names(names: Sequence[str]) -> str:
    """Three of them, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(code(name) for name in names[:3]) + more


def hardware(components: Sequence[ComponentEntry]) -> Md:
    """What the packed weights are made for."""
    lines = []
    for entry in components:
        layout = entry.layout
        least = ".".join(map(str, layout.min_capability or []))
        needs = f", compute capability {least} or higher" if least else ""
        if layout.device == "any":
            needs = f"; a CUDA device needs compute capability {least} or higher" if least else ""
        device = "any device" if layout.device == "any" else f"{layout.device} only"
        lines.append(f"{device}{needs} ({text(layout.packing)} layout)")
    return Md("; ".join(dict.fromkeys(lines)))
