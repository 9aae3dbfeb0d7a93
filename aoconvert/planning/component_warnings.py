"""What is not wrong with a plan, but the user should know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aoconvert import schemes
from aoconvert.formats.registry import TORCH_BIN
from aoconvert.humanize import plural, size
from aoconvert.models import ModelPart, join
from aoconvert.originals import describe
from aoconvert.planning.decide import nbytes
from aoconvert.planning.types import ComponentPlan, LeftOut, TensorPlan
from aoconvert.schemes.apply import quantize_weight
from aoconvert.sources.adapters import ADAPTER_CONFIG, adapter_files
from aoconvert.sources.file import FileSource

if TYPE_CHECKING:
    from aoconvert.sources import Source

_INT8_BYTES = 0.9  # bytes per parameter; a scheme above it promises nothing smaller than int8wo


def component_warnings(source: Source, component: ComponentPlan) -> list[str]:
    """Say what is not wrong with a component, but the user should know."""
    title = component.component.title
    lines = list(dict.fromkeys(f"{title}: {note}" for scheme in component.schemes for note in scheme.notes))
    if isinstance(source, FileSource) and source.note is not None:
        lines.append(f"{title}: {source.note}")
    if component.original is not None:
        lines.append(f"{title}: {describe(component.original)}")
        lines += _carry_warnings(title, component)
    if component.cannot_run is not None:
        dtype, error = component.cannot_run
        what = (
            f"it stays in {component.dtype}"
            if component.dtype != dtype
            else "--dtype float32 makes a checkpoint that runs"
        )
        lines.append(f"{title}: {component.component.class_name} cannot run in {dtype} ({error}); {what}")
    if component.component.config.get("experts_implementation") == "eager":
        lines.append(
            f"{title}: its experts run one after the other; transformers has no faster path for this tensor class"
        )
    if component.skeleton.fused:
        lines.append(
            f"{title}: from_pretrained cannot open fused projections; the load code on the card assigns the weights"
        )
    if component.component.library == "diffusers" and component.format is TORCH_BIN and len(component.files) > 1:
        lines.append(f"{title}: diffusers opens a sharded .bin only with use_safetensors=False")
    for name, origin in component.apart:
        lines.append(f"{title}: {name} and {origin} should be tied according to its config, but differ: both are kept")
    lines += _adapter_warnings(source, component.component)
    lines += _counted(title, "unknown to its class, carried over unchanged", component.carried)
    lines += dropped_warning(title, component.dropped)
    lines += _counted(title, "that the checkpoint does not hold, left to the library", component.missing)
    totals = component.totals
    if (larger := _larger_than_int8(component)) is not None:
        lines.append(f"{title}: {larger}")
    elif totals.bytes_out > totals.bytes_in > 0:
        sizes = f"{size(totals.bytes_in)} become {size(totals.bytes_out)}"
        lines.append(f"{title}: {sizes}: the result is larger than its source; choose another scheme")
    lines += _whole_warning(title, component)
    lines += _lora_warnings(title, component)
    if component.copied is not None:
        lines.append(
            f"{title}: transformers holds a second copy of its merged tensors during the run ({component.copied})"
        )
    return lines


def _carry_warnings(title: str, component: ComponentPlan) -> list[str]:
    """How many weights keep the codes of the original, and why others do not."""
    if component.original is None or not component.original.carried:
        return []
    again = Counter(t.reason for t in component.tensors if t.scheme is not None and not t.carried)
    rest = "".join(f"; {count} {why}" for why, count in again.most_common(2))
    return [f"{title}: {plural(component.original.carried, 'weight')} keep the codes of the original{rest}"]


def _lora_warnings(title: str, component: ComponentPlan) -> list[str]:
    """How many tensors each LoRA changes, where the library would round what it adds."""
    counts = Counter(delta.lora.label for deltas in component.deltas.values() for delta in deltas)
    tensors = {tensor.name: tensor for tensor in component.tensors}
    rounded = {tensors[name].source_dtype for name in component.deltas} - {"float32"}
    lines = [f"{title}: --lora {label} changes {count} tensors" for label, count in counts.items()]
    if rounded:
        lines.append(
            f"{title}: LoRAs are added in float32; the library, fusing them into {', '.join(sorted(rounded))}, rounds "
            f"more often"
        )
    return lines


def _whole_warning(title: str, component: ComponentPlan) -> list[str]:
    """Tensors of a single file that are made whole, and what that takes."""
    from aoconvert.models.recording import ReplayRecipe

    whole = [
        tensor
        for tensor in component.tensors
        if isinstance(recipe := component.recipes.get(tensor.name), ReplayRecipe)
        and not recipe.step.streams
        and tensor.shape
    ]
    if not whole:
        return []
    most = max(tensor.bytes_in + tensor.working_bytes for tensor in whole)
    return [f"{title}: {len(whole)} tensors are made whole when diffusers' conversion is done, up to {size(most)} each"]


def _adapter_warnings(source: Source, component: ModelPart) -> list[str]:
    if component.library != "transformers":
        return []
    if found := adapter_files(source, component.folder):
        name = found[-1].rpartition("/")[2]
        # integrations.peft.maybe_load_adapters: only what is a folder keeps its own weights
        hub = "; for a repo on the Hub, transformers then opens the model that the adapter names as its base"
        return [f"{component.title}: {name} beside its weights is loaded with the weights where peft is installed{hub}"]
    if source.has(join(component.folder, ADAPTER_CONFIG)):
        return [f"{component.title}: {ADAPTER_CONFIG} belongs to an adapter whose weights are missing; it is left out"]
    return []


def _larger_than_int8(component: ComponentPlan) -> str | None:
    """Weights of fewer than 8 bits that take more bytes than int8wo's would: padding makes small layers large."""
    few = [t for t in component.tensors if t.scheme is not None and t.scheme.format.bytes_per_parameter < _INT8_BYTES]
    if not few:
        return None
    here = sum(tensor.bytes_out for tensor in few)
    counts = Counter((tensor.shape, tensor.dtype) for tensor in few)
    int8 = sum(count * _int8_bytes(*kind) for kind, count in counts.items())
    if here <= int8:
        return None
    names = "+".join(dict.fromkeys(t.scheme.name for t in few if t.scheme is not None))
    return f"{names} takes {size(here)}, int8wo would take {size(int8)}: the layout pads layers this small"


def _int8_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """What int8wo stores for a weight."""
    import torch

    return nbytes(
        quantize_weight(torch.empty(shape, dtype=getattr(torch, dtype), device="meta"), schemes.get("int8wo"))
    )


def dropped_warning(title: str, dropped: Sequence[LeftOut]) -> list[str]:
    """What the checkpoint holds and the result does not; no line where that is nothing."""
    return _counted(title, "of the checkpoint left out as unused", dropped)


def _counted(title: str, what: str, items: Sequence[LeftOut | TensorPlan]) -> list[str]:
    if not items:
        return []
    shown = ", ".join(item.name for item in items[:3]) + (", …" if len(items) > 3 else "")
    return [f"{title}: {plural(len(items), 'tensor')} {what}: {shown}"]
