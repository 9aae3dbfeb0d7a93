"""Small checkpoints that are quantized already, in the layouts in which originals are published."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import aoconvert
from aoconvert.progress import Silent
from helpers.bits import assert_same

State = dict[str, torch.Tensor]
Stored = Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]


class StopAfter(Silent):
    """Ctrl-C after some tensors are written."""

    left = 9

    def advance(self, nbytes: int, current: str = "") -> None:
        if threading.current_thread().name == "aoconvert-writer":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def rewrite(folder: Path, config: Mapping[str, Any], stored: Stored) -> Path:
    """Quantize the matrices of a model's layers in its folder; ``stored`` gives what is written for one."""
    places: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        state: State = {}
        for name, tensor in load_file(path).items():
            matrix = tensor.dim() > 1 and not any(word in name for word in ("embed", "lm_head", ".gate.weight"))
            state |= stored(name, tensor) if matrix else {name: tensor}
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, {"format": "pt"})
        places |= dict.fromkeys(state, path.name)
    if len(set(places.values())) > 1:
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "weight_map": places}))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": dict(config)}))
    return folder


def edit(folder: Path, change: Callable[[State], object]) -> None:
    """Change the tensors of a checkpoint of one file."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def written(folder: Path) -> State:
    """The tensors of a result of one file."""
    from aoconvert.environment import import_torchao

    import_torchao()
    found: State = torch.load(folder / "pytorch_model.bin", weights_only=True)
    return found


def assert_as_opened(source: Path, opened: Any, folder: Path, **options: Any) -> Any:
    """Quantizing the source gives what quantizing the model gives that the library opened.

    Args:
        source: a quantized checkpoint.
        opened: what the library makes of it, dequantized.
        folder: an empty one.
        options: of the conversion.

    Returns:
        The result of the source.
    """
    plain = folder / "plain"
    plain.mkdir()
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    # save_pretrained would quantize it again
    state = {name: tensor.clone() for name, tensor in opened.state_dict().items()}
    save_file(state, plain / "model.safetensors", {"format": "pt"})
    options = {"scheme": "int8wo", "device": "cpu", "min_quantized": 0.0, **options}
    made = aoconvert.quantize(source, output=folder / "made", **options)
    aoconvert.quantize(plain, output=folder / "reference", **options)
    here, there = written(folder / "made"), written(folder / "reference")
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        assert_same(here[name], tensor, name)
    return made


def block_fp8(block: tuple[int, int] | None, scale_dtype: torch.dtype = torch.float32) -> Stored:
    """DeepSeek-V3's layout: ``float8_e4m3fn``, and a scale for each block, or for the whole."""

    def stored(name: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        rows, columns = weight.shape
        height, width = block or weight.shape
        scales = torch.empty(-(-rows // height), -(-columns // width))
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                scales[i, j] = (weight[at].float().abs().max() / 448).to(scale_dtype)
                codes[at] = (weight[at].float() / scales[i, j]).to(torch.float8_e4m3fn)
        scale = scales.to(scale_dtype) if block else scales[0, 0].to(scale_dtype)
        return {name: codes, f"{name}_scale_inv": scale}

    return stored


def compressed(
    form: str, activations: Mapping[str, Any] | None = None, **weights: Any
) -> tuple[dict[str, Any], Stored]:
    """compressed-tensors: the config, and what its own compressor stores for a matrix."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": activations}
    config = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    args = QuantizationArgs(**group["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)

    def stored(name: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        grid = _grid(weight, args)
        whole = generate_gparam(weight.amin(), weight.amax()) if str(args.strategy) == "tensor_group" else None
        scale, zeros = calculate_qparams(grid.amin((1, 3)), grid.amax((1, 3)), args, whole)
        state = {"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_zero_point": zeros}
        state |= {"weight_global_scale": whole} if whole is not None else {}
        if str(args.strategy) == "tensor":
            state |= {key: value.reshape(1) for key, value in state.items() if key != "weight"}
        made = BaseCompressor.get_value_from_registry(form).compress(state, scheme)
        made |= {"input_scale": torch.tensor([0.5])} if activations and not activations.get("dynamic") else {}
        return {f"{name.removesuffix('weight')}{key}": value for key, value in made.items()}

    return {**config, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}, stored


def modelopt(*, per_row: bool = False, scale_shape: tuple[int, ...] = ()) -> tuple[dict[str, Any], Stored]:
    """NVIDIA's Model Optimizer: ``quantization_config``, and what ``to_quantized_weight`` (0.47) stores."""
    algorithm = "FP8_PER_CHANNEL_PER_TOKEN" if per_row else "FP8"
    config: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
    config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}

    def stored(name: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        largest = weight.float().abs().amax(1) if per_row else weight.float().abs().max()
        scale, module = largest / 448, name.removesuffix("weight")
        codes = (weight.float() / (scale[:, None] if per_row else scale)).to(torch.float8_e4m3fn)
        found = {name: codes, f"{module}weight_scale": scale if per_row else scale.reshape(scale_shape)}
        if not per_row:
            found[f"{module}input_scale"] = torch.tensor(0.01)
        if name.endswith("k_proj.weight"):
            found[f"{module}k_scale"] = torch.tensor(0.02)
        return found

    return config, stored


def _grid(weight: torch.Tensor, args: Any) -> torch.Tensor:
    """The values as blocks: (rows of blocks, rows, columns of blocks, columns)."""
    rows, columns = weight.shape
    height, width = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, args.group_size),
        "tensor_group": (1, args.group_size),
        "block": args.block_structure,
    }[args.strategy]
    return weight.reshape(rows // height, height, columns // width, width)
