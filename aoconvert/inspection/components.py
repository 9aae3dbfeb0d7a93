"""One model of a checkpoint: its files put together, and what can load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from aoconvert.checkpoint.manifest import Manifest
from aoconvert.environment import version_at_least, version_of
from aoconvert.errors import UsageError
from aoconvert.formats.torch_bin.contents import BinTensor
from aoconvert.inspection import compat
from aoconvert.inspection.demands import demand_of, signs
from aoconvert.inspection.foreign import GGUF_LANGUAGE_MODELS, PACKAGES, scheme_of_kind
from aoconvert.inspection.types import Component, FileFacts, Loading
from aoconvert.inspection.writer import find_writer
from aoconvert.schemes import int4
from aoconvert.schemes.tensor_classes import PackedLayout

# It reads only torchao configs there; which release first refused a name is not known (shared facts).
_NO_NAMES = "0.42"


def component(
    name: str,
    library: str | None,
    class_name: str | None,
    files: Sequence[FileFacts],
    config: Mapping[str, Any],
    manifest: Manifest | None,
    problem: str | None = None,
) -> Component:
    """Put a component together.

    Args:
        name: in the pipeline, or ``""``.
        library, class_name: as the configs say.
        files: its weights.
        config: its ``config.json``, or empty.
        manifest: ``aoconvert.json`` that lists it.
        problem: why no loader finds its files.
    """
    quantization = quantization_config(config)
    files = signs(files, quantization)
    kind = _kind(files)
    entries = [tensor.entry for file in files for tensor in file.tensors if tensor.entry is not None]
    classes = {part.class_name.rpartition(".")[2] for entry in entries for part in compat.parts(entry)} or {
        tensor.class_name.rpartition(".")[2] for file in files for tensor in file.tensors
    }
    layout, packing = demand_of(files), _cpu_packing(name, manifest)
    if layout is not None and packing is not None:
        layout = replace(layout, note=None)  # the manifest says what the file does not
    loading = _find_loading(kind, files, entries, classes)
    needs = PACKAGES.get(kind, ())
    writer = find_writer(files, config, manifest)
    scheme = _scheme(kind, files, quantization)
    problems, unknown = _problems(kind, files, loading, layout, needs, library, quantization)
    if packing is not None and (misfit := int4.misfit(packing)) is not None:
        problems.append(misfit)
    problems = [problem, *problems] if problem else problems
    advice = _advice(kind, scheme, files, loading, layout, quantization, entries)
    return Component(
        name=name,
        kind=kind,
        library=library,
        class_name=class_name,
        scheme=scheme,
        files=tuple(files),
        layout_device=layout.device if layout else "any",
        min_capability=layout.min_capability if layout else None,
        written_by=writer,
        loading=loading,
        needs=needs,
        problems=tuple(problems),
        advice=tuple(advice),
        loads_here=False if problems else None if unknown else True,
    )


def _cpu_packing(name: str, manifest: Manifest | None) -> str | None:
    """What the manifest says of the component's packing, where that is for one kind of CPU."""
    found = [entry.layout.packing for entry in manifest.components if entry.name == name] if manifest else []
    return found[0] if found and int4.cpu_layout(found[0]) is not None else None


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``quantization_config`` of a model's config, or ``compression_config`` as older compressed-tensors wrote it."""
    found = config.get("quantization_config") or config.get("compression_config")
    return found if isinstance(found, Mapping) else {}


def _kind(files: Sequence[FileFacts]) -> str:
    """The kind of most bytes, a quantized one before a plain one."""
    sizes: dict[str, int] = {}
    for file in files:
        sizes[file.kind] = sizes.get(file.kind, 0) + file.size
    special = {kind: size for kind, size in sizes.items() if kind != "plain"} or sizes
    return max(special, key=lambda kind: special[kind])


def _scheme(kind: str, files: Sequence[FileFacts], config: Mapping[str, Any]) -> str | None:
    numbers: dict[str, int] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.scheme is not None:
                numbers[tensor.scheme] = numbers.get(tensor.scheme, 0) + tensor.numel
    if numbers:
        return "+".join(sorted(numbers, key=lambda scheme: (-numbers[scheme], scheme)))
    return next((found for file in files if (found := scheme_of_kind(kind, config, file.metadata))), None)


def _find_loading(
    kind: str, files: Sequence[FileFacts], entries: Sequence[BinTensor], classes: set[str]
) -> Loading | None:
    if kind == "torchao":
        return compat.find_loading({name for file in files for name in file.globals}, entries)
    if kind == "torchao-safetensors":
        return compat.find_loading_safetensors(classes - {"Tensor"})
    return None


def _problems(
    kind: str,
    files: Sequence[FileFacts],
    loading: Loading | None,
    layout: PackedLayout | None,
    needs: Sequence[str],
    library: str | None,
    config: Mapping[str, Any],
) -> tuple[list[str], bool]:
    """Why it cannot be loaded here, and whether that is not known."""
    problems = [file.unsafe for file in files if file.unsafe]
    unknown = kind not in PACKAGES
    for package in needs:
        if version_of(package) is None:
            problems.append(f"{package} is not installed")
    version = version_of("torchao")
    if loading is not None and version is not None:
        fits = compat.fits(version, loading)
        if fits is False:
            problems.append(f"torchao {version} is installed, but it loads with {span_text(loading)}")
            problems += loading.why
        unknown = unknown or fits is None
    named = loading is not None and library == "diffusers" and isinstance(config.get("quant_type"), str)
    if named and version_at_least("diffusers", _NO_NAMES):
        problems.append(
            f"diffusers {version_of('diffusers')} does not read the quant_type {config['quant_type']!r} of its "
            "config.json: it is a name, but must now be a torchao config"
        )
    if layout is not None and layout.device != "any":
        here = _device_here(layout)
        unknown = unknown or here is None
        if here is False:
            need = (
                f" of capability {'.'.join(map(str, layout.min_capability))} or higher" if layout.min_capability else ""
            )
            if layout.device != "cpu":
                made = "are packed for" if layout.packed else "can be multiplied only on"
                problems.append(f"its weights {made} {layout.device}{need}, which is not here")
    return problems, unknown


def _dot(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _device_here(layout: PackedLayout) -> bool | None:
    """Whether the layout's device is here; ``None`` where torch cannot be asked. Only asked for packed layouts."""
    if layout.device == "cpu":
        return None if layout.note else True
    from aoconvert.environment import device_facts
    from aoconvert.errors import PlanError

    try:
        facts = device_facts(layout.device)
    except PlanError:
        return False
    except (ImportError, OSError, RuntimeError):
        return None
    if layout.min_capability is None:
        return True
    return facts.capability is not None and facts.capability >= layout.min_capability


def span_text(loading: Loading) -> str:
    """``torchao 0.7 to 0.17``."""
    if not loading.possible:
        return "no torchao release that aoconvert knows"
    if loading.maximum is None:
        return f"torchao {loading.minimum} or later"
    if loading.minimum == loading.maximum:
        return f"torchao {loading.minimum} only"
    return f"torchao {loading.minimum} to {loading.maximum}"


def requirement(loading: Loading) -> str | None:
    """As pip takes it: ``torchao>=0.7,<0.18``."""
    if not loading.possible or loading.minimum is None:
        return None
    if loading.maximum is None:
        return f"torchao>={loading.minimum}"
    major, minor = loading.maximum.split(".")[:2]
    return f"torchao>={loading.minimum},<{major}.{int(minor) + 1}"


def _advice(
    kind: str,
    scheme: str | None,
    files: Sequence[FileFacts],
    loading: Loading | None,
    layout: PackedLayout | None,
    config: Mapping[str, Any],
    entries: Sequence[BinTensor],
) -> list[str]:
    advice: list[str] = []
    unsafe = [file for file in files if file.unsafe]
    if unsafe:
        advice.append("do not load it, least of all with weights_only=False; ask its author for safetensors")
        if any("builtins.getattr" in (file.unsafe or "") for file in unsafe):
            advice.append("Python 3.11.2 pickles enums through getattr: write the file again with another Python")
    if loading is not None:
        advice += _advise_loading(loading, scheme)
    if layout is not None and layout.note:
        advice.append(f"packed for {layout.device}: {layout.note}")
    if layout is not None and layout.min_capability:
        need = _dot(layout.min_capability)
        packed = f"packed for {layout.device}: it runs" if layout.packed else "on CUDA it runs"
        advice.append(f"{packed} only on capability {need} or higher")
    advice += _foreign_advice(kind, config)
    if kind == "gguf" and {file.metadata.get("general.architecture") for file in files} - GGUF_LANGUAGE_MODELS:
        advice.append("of a diffusers denoiser: aoconvert quantize FILE --scheme int8wo --config FOLDER or REPO")
    places = {leaf.location for entry in entries for _, leaf in entry.leaves()}
    if any(place.startswith(("cuda", "xpu")) for place in places):
        advice.append('it was saved from a GPU: torch.load(..., map_location="cpu") where there is none')
    if kind == "torchao" and scheme is not None and "unknown" in scheme.split("+"):
        advice.append("aoconvert does not know one of its tensor classes well enough to name the scheme")
    return advice


def _advise_loading(loading: Loading, scheme: str | None) -> list[str]:
    advice = []
    version = version_of("torchao")
    if version is None or compat.fits(version, loading) is False:
        if loading.possible and loading.maximum is None:
            advice.append(f"install it: pip install '{requirement(loading)}'")
        elif loading.possible:
            advice.append(
                f"to open it unchanged: pip install torchao=={loading.best}, with the torch and diffusers releases "
                f"of that time"
            )
        else:
            advice.append("no torchao release that aoconvert knows loads it")
        if loading.maximum is not None or not loading.possible:
            advice.append(_MIGRATE)
            advice.append(
                "or quantize the original again, which gives slightly different values (±1 for int8): "
                f"aoconvert quantize SOURCE --scheme {_nearest(scheme)}"
            )
    if loading.imports:
        names = ", ".join(loading.imports)
        advice.append(f"before torch.load(weights_only=True): import {names}")
    if loading.safe_globals:
        names = ", ".join(loading.safe_globals)
        advice.append(f"torchao does not register {names}: load it under torch.serialization.safe_globals([...])")
    return advice


def _nearest(scheme: str | None) -> str:
    """A scheme of this aoconvert in place of an old one."""
    from aoconvert import schemes

    for name in (scheme or "").split("+"):
        try:
            return schemes.find(name).name
        except UsageError as error:
            hint = error.hint or ""
            if hint.startswith("nearest that works: "):
                return hint.removeprefix("nearest that works: ").split()[0].rstrip(",;")
    return "int8wo"


_MIGRATE = "migrate writes it in torchao's tensor classes of today, with the same codes and scales"


def _foreign_advice(kind: str, config: Mapping[str, Any]) -> list[str]:
    if kind == "quanto":
        if config.get("quant_method") == "quanto":
            return ["diffusers has deprecated QuantoConfig, and removes it in 1.0", _MIGRATE]
        return [
            "written by optimum-quanto itself: plain diffusers opens it without an error and leaves the weights on "
            "meta; use optimum.quanto's QuantizedDiffusersModel or QuantizedTransformersModel",
            _MIGRATE,
        ]
    if kind == "gguf":
        return ["open it with llama.cpp, or with from_single_file / gguf_file of diffusers or transformers"]
    if kind in ("bitsandbytes", "gptq", "awq"):
        return [f"{kind} weights need their own kernels; torchao cannot load them"]
    return []
