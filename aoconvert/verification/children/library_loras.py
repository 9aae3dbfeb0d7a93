"""How the libraries add LoRAs to a model that was opened. For ``library_child`` alone.

aoconvert adds in float32, and rounds the sum once; a library does the same with weights that are float32. So the layers
that a LoRA changes are made float32 first, and no others: the rest of the model stays mapped.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class NotAdded(Exception):
    """The library does not add the LoRA here: it is not installed, does not know it, or needs more memory."""


def add_loras(model: Any, loras: list[dict[str, Any]], available: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """Add them by the library's own code.

    Args:
        model: a model or a pipeline.
        loras: ``file``, ``weight``, ``peft`` (the file lies beside the ``adapter_config.json`` of PEFT).
        available: bytes of memory that may be used.

    Returns:
        The model, and name → a tensor without data of each that was cast to float32, with its dtype before. Names in
        a pipeline begin with the part's.

    Raises:
        NotAdded: that cannot be done here.
    """
    for package in ("peft", "accelerate"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise NotAdded(f"a LoRA was added, and {package}, by which the library adds it, is not installed") from None
    added = _by_peft if any(lora["peft"] for lora in loras) else _by_diffusers
    if added is _by_peft and not all(lora["peft"] for lora in loras):
        raise NotAdded("of the LoRAs only some are in PEFT's form, and no library adds both kinds to one model")
    try:
        before = _cast(model, added(model, loras, find=True), available)
        return added(model, loras, find=False), before
    except NotAdded:
        raise
    except Exception as error:  # each library in its own words
        said = (str(error).strip().splitlines() or [""])[0]
        raise NotAdded(f"the library does not add the LoRA here: {type(error).__name__}: {said}") from error


def _by_peft(model: Any, loras: list[dict[str, Any]], *, find: bool) -> Any:
    """PEFT's ``merge_and_unload``; or, to ``find``, names of the layers that change."""
    peft = importlib.import_module("peft")
    if not isinstance(model, torch.nn.Module):
        raise NotAdded("a LoRA in PEFT's form was added to a pipeline, and no library adds that to a pipeline")
    wrapped, names = None, [f"lora{number}" for number in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        folder = str(Path(lora["file"]).parent)
        if wrapped is None:
            wrapped = peft.PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            wrapped.load_adapter(folder, adapter_name=name)
    assert wrapped is not None
    if find:
        layers = [name.removeprefix("base_model.model.") for name in _list_layers(wrapped)]
        wrapped.unload()
        return layers
    wrapped.base_model.set_adapter(names)
    for module in wrapped.modules():
        if hasattr(module, "set_scale"):
            for name, lora in zip(names, loras, strict=True):
                module.set_scale(name, lora["weight"])
    return wrapped.merge_and_unload(adapter_names=names)


def _by_diffusers(model: Any, loras: list[dict[str, Any]], *, find: bool) -> Any:
    """diffusers' ``fuse_lora``; or, to ``find``, names of the layers that change."""
    names = [f"lora{number}" for number in range(len(loras))]
    pipeline = not isinstance(model, torch.nn.Module)
    for name, lora in zip(names, loras, strict=True):
        file = Path(lora["file"])
        options = {"weight_name": file.name, "adapter_name": name, "local_files_only": True}
        if pipeline:
            model.load_lora_weights(str(file.parent), **options)
        else:
            _load_into_model(model, file, options)
    parts = (
        {part: item for part, item in model.components.items() if isinstance(item, torch.nn.Module)} if pipeline else {}
    )
    if find:
        layers = list(_list_layers(model)) if not pipeline else []
        layers += [f"{part}.{name}" for part, item in parts.items() for name in _list_layers(item)]
        model.unload_lora_weights() if pipeline else model.unload_lora()
        return layers
    model.set_adapters(names, [lora["weight"] for lora in loras])
    if pipeline:
        changed = [part for part, item in parts.items() if any(_list_layers(item))]
        model.fuse_lora(components=changed, adapter_names=names)
        model.unload_lora_weights()
    else:
        model.fuse_lora(adapter_names=names)
        model.unload_lora()
    return model


def _load_into_model(model: Any, file: Path, options: dict[str, Any]) -> None:
    """One LoRA into a model without a pipeline; its names may begin with that of the pipeline's part."""
    utils = importlib.import_module("diffusers.models.model_loading_utils")
    state = utils.load_state_dict(str(file))
    firsts = {name.partition(".")[0] for name in state}
    prefix = next(iter(firsts)) if len(firsts) == 1 and firsts <= {"transformer", "unet"} else None
    alphas = {name: float(value) for name, value in state.items() if name.endswith(".alpha")}
    if not alphas:
        model.load_lora_adapter(str(file.parent), prefix=prefix, **options)
        return
    state = {name: value for name, value in state.items() if name not in alphas}
    model.load_lora_adapter(state, prefix=prefix, network_alphas=alphas, adapter_name=options["adapter_name"])


def _list_layers(model: torch.nn.Module) -> Iterator[str]:
    """Names of the layers that a LoRA wraps."""
    layer = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    return (name for name, module in model.named_modules() if isinstance(module, layer))


def _cast(model: Any, layers: list[str], available: int) -> dict[str, torch.Tensor]:
    """Make layers float32 in place; gives what their tensors were."""
    found = [(name, _layer(model, name)) for name in dict.fromkeys(layers)]
    nbytes = sum(4 * tensor.numel() for _, module in found for tensor in module.parameters(recurse=False))
    if nbytes > available:
        raise NotAdded(
            f"the library adds the LoRA to whole layers, which takes {nbytes / 1e9:.1f} GB of memory; "
            f"{available / 1e9:.1f} GB are available"
        )
    before = {}
    for name, module in found:
        for leaf, tensor in list(module.named_parameters(recurse=False)):
            before[f"{name}.{leaf}"] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            setattr(module, leaf, torch.nn.Parameter(tensor.detach().to(torch.float32), requires_grad=False))
    return before


def _layer(model: Any, name: str) -> torch.nn.Module:
    if isinstance(model, torch.nn.Module):
        return model.get_submodule(name)
    part, _, rest = name.partition(".")
    found: torch.nn.Module = model.components[part].get_submodule(rest)
    return found
