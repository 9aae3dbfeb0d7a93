"""How the library opens a source and a result: as its users do, and mapped wherever the library can.

A model that is opened in the dtype of its files stays mapped: nothing of it is copied into memory. So a source is
opened in the dtype that it is stored in, and what the library would have made of it in another dtype (dtypes, buffers
that no file holds) is asked of a second one, which takes no memory either.
"""

from __future__ import annotations

import importlib
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_WEIGHTS = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)([.-].+)?\.(safetensors|bin)")


CONFIG_BYTES, INDEX_BYTES = 16 << 20, 128 << 20  # as aoconvert.json_text has them, which is not to be imported here


class CannotCompare(Exception):
    """Why nothing can be compared here, which is no fault of the result."""


class TooLarge(CannotCompare):
    """The library can open a model only whole, and there is no memory for that."""


class OwnCode(CannotCompare):
    """A model's class is code inside the checkpoint, and that must not run."""


def weights_files(folder: Path, variant: str | None) -> list[Path]:
    """The files that hold the weights: those of the variant where there are any, safetensors before ``.bin``.

    Others beside them are data: voices, filters, the authors' own layout.
    """
    if named := _list_named_files(folder):
        return named
    found = sorted(path for path in folder.glob("*") if _WEIGHTS.fullmatch(path.name) and path.is_file())
    for suffix in (".safetensors", ".bin"):
        kind = [path for path in found if path.suffix == suffix]
        chosen = [path for path in kind if variant is not None and f".{variant}" in path.name]
        plain = [path for path in kind if len(path.name.split(".")) == 2]
        if chosen or plain or kind:
            return chosen or plain or kind
    return []


def read_json(path: Path, most: int) -> Any:
    """The value of a JSON file.

    Raises:
        CannotCompare: it has more than ``most`` bytes, or is not a regular file.
    """
    if not path.is_file() or path.stat().st_size > most:
        raise CannotCompare(f"{path.name} is not a file of at most {most:,} bytes")
    return json.loads(path.read_text(encoding="utf-8"))


def _list_named_files(folder: Path) -> list[Path]:
    """What ``transformers_weights`` of a config names: a file of weights, or an index of some."""
    config = folder / "config.json"
    name = read_json(config, CONFIG_BYTES).get("transformers_weights") if config.is_file() else None
    if not isinstance(name, str):
        return []
    if name.endswith(".index.json"):
        shards = read_json(folder / name, INDEX_BYTES)["weight_map"].values()
        return [folder / shard for shard in sorted(set(shards))]
    return [folder / name]


def list_stored(file: Path) -> Iterator[tuple[str, torch.dtype, int]]:
    """Name, dtype and size in bytes of each tensor of a weights file, from its header or its pickle."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no mapping)
                lazy = opened.get_slice(name)
                size = 1
                for length in lazy.get_shape():
                    size *= length
                dtype = _dtype(lazy.get_dtype())
                yield name, dtype, size * dtype.itemsize
        return
    mapped = zipfile.is_zipfile(file)
    for name, tensor in torch.load(file, weights_only=True, mmap=mapped or None, map_location="meta").items():
        if isinstance(tensor, torch.Tensor):
            yield name, tensor.dtype, tensor.numel() * tensor.dtype.itemsize


def _dtype(name: str) -> torch.dtype:
    """``BF16`` → ``torch.bfloat16``, as safetensors itself has it; its table lacks one that its reader knows."""
    from safetensors.torch import _TYPES

    found: torch.dtype = torch.float8_e8m0fnu if name == "F8_E8M0" else _TYPES[name]
    return found


def stored_dtype(folder: Path, variant: str | None) -> torch.dtype | None:
    """The floating dtype that most of a model's bytes are stored in; ``None`` where there is none."""
    counts: Counter[torch.dtype] = Counter()
    for file in weights_files(folder, variant):
        for _, dtype, size in list_stored(file):
            if dtype in (torch.float32, torch.float16, torch.bfloat16):
                counts[dtype] += size
    return counts.most_common(1)[0][0] if counts else None


def stored_names(folder: Path, variant: str | None) -> dict[str, Path]:
    """Name of each tensor in a model's files → the file."""
    return {name: file for file in weights_files(folder, variant) for name, _, _ in list_stored(file)}


def quantized_modules(folder: Path, variant: str | None) -> set[str]:
    """Names of the modules of which a quantized original holds codes of 8 bits or less, with their scales."""
    stored = (entry for file in weights_files(folder, variant) for entry in list_stored(file))
    return {name.rpartition(".")[0] for name, dtype, _ in stored if dtype.itemsize == 1 or dtype == torch.int32}


def read(name: str, file: Path) -> torch.Tensor:
    """One tensor of a file, mapped."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(file), framework="pt") as opened:
            return torch.as_tensor(opened.get_tensor(name))
    return torch.as_tensor(torch.load(file, weights_only=True, mmap=zipfile.is_zipfile(file) or None)[name])


def model_class(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class that opens a model, and what ``from_pretrained`` has to be told; the auto class for remote code.

    Where the checkpoint was made with its own code, that opens it, also where the library has a class by that name.

    Raises:
        OwnCode: the class is code inside the checkpoint, and remote code is not allowed.
        LookupError: there is no such class.
    """
    module, class_name = importlib.import_module(request["module"]), request["class_name"]
    auto_class = request["auto_class"]
    if auto_class is not None and not request["trust"]:
        raise OwnCode(f"{class_name} is code inside the checkpoint: it runs only with --trust-remote-code")
    found = getattr(module, auto_class or class_name, None)
    if found is None:
        raise LookupError(f"{auto_class or class_name} is not a class of {request['module']}")
    return found, {"trust_remote_code": True} if auto_class is not None else {}


def open_model(request: dict[str, Any], root: Path, folder: str, **options: Any) -> tuple[Any, dict[str, list[str]]]:
    """``from_pretrained`` of one model, and the library's loading report."""
    where = root / folder
    cls, more = model_class(request)
    options = {"output_loading_info": True, "local_files_only": True, **more, **options}
    if (quantization := quantization_of(where)) is None:
        model, report = cls.from_pretrained(str(where), **options)
    else:
        model, report = _open_dequantized(cls, where, quantization, options)
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return model, {key: sorted(str(name) for name in report.get(key) or ()) for key in keys}


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """How an original is quantized; ``None`` where it is not, and of a torchao checkpoint."""
    path = folder / "config.json"
    config = read_json(path, CONFIG_BYTES) if path.is_file() else {}
    found = config.get("quantization_config") or config.get("compression_config")
    return found if isinstance(found, dict) and found.get("quant_method") != "torchao" else None


def _open_dequantized(cls: Any, where: Path, quantization: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """A quantized original, which the library itself dequantizes, while it opens it or afterwards.

    Raises:
        CannotCompare: it cannot on this machine.
    """
    method = quantization.get("quant_method", "bitsandbytes")
    if method == "modelopt":
        raise CannotCompare("transformers does not dequantize models by NVIDIA's Model Optimizer")
    if method == "fp8" and (name := _cut_block(where, quantization.get("weight_block_size"))) is not None:
        raise CannotCompare(f"the library takes blocks of equal size only, and the last ones of {name} are cut off")
    try:
        if method != "bitsandbytes":
            auto = importlib.import_module("transformers.quantizers.auto").AutoQuantizationConfig
            options = {**options, "quantization_config": auto.from_dict({**quantization, "dequantize": True})}
        model, report = cls.from_pretrained(str(where), **options)
        return (model.dequantize() if method == "bitsandbytes" else model), report
    except Exception as error:  # a package or a kernel that is not there; blocks that it does not take
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CannotCompare(f"the library cannot dequantize the original ({method}) here: {first}") from error


def _cut_block(folder: Path, block: Any) -> str | None:
    """A weight in 8-bit floating point whose last blocks are cut off: the library makes other blocks of it."""
    from safetensors import safe_open

    for file in weights_files(folder, None) if isinstance(block, list) else ():
        if file.suffix == ".safetensors":
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (no mapping)
                    lazy = opened.get_slice(name)
                    sizes = zip(lazy.get_shape()[-2:], block, strict=False)
                    if lazy.get_dtype().startswith("F8") and any(size % length for size, length in sizes):
                        return str(name)
    return None


def dtype_option(library: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """How ``from_pretrained`` is told a dtype."""
    if dtype is None:
        return {}
    return {"dtype": dtype} if library == "transformers" else {"torch_dtype": dtype}


def require_memory(request: dict[str, Any], root: Path, folder: str, variant: str | None, available: int) -> None:
    """Whether there is memory for what the library cannot leave in the files.

    Files that are not zips are read whole; tensors that transformers makes out of several (a mixture's experts) are
    made in memory.

    Raises:
        TooLarge: there is not.
    """
    files = weights_files(root / folder, variant)
    quantized = quantization_of(root / folder) is not None  # nothing of it stays in the files
    sizes = {name: size for file in files for name, _, size in list_stored(file)}
    if sum(sizes.values()) <= available and not quantized:
        return
    whole = sum(file.stat().st_size for file in files if file.suffix == ".bin" and not zipfile.is_zipfile(file))
    if request["library"] == "transformers":
        whole += sum(size for name, size in _state(request, root / folder).items() if quantized or name not in sizes)
    if whole > available:
        raise TooLarge(
            f"the library loads {request['class_name']} completely, which takes {whole / 1e9:.1f} GB of memory;"
            f" {available / 1e9:.1f} GB are available"
        )


def _state(request: dict[str, Any], folder: Path) -> dict[str, int]:
    """Name → bytes of the tensors that a model of transformers consists of; those of a base model under both names."""
    cls, more = model_class(request)
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, **more)
    with torch.device("meta"):
        model = (
            cls._from_config(config, dtype=torch.bfloat16) if hasattr(cls, "_from_config") else cls.from_config(config)
        )
    return {name: tensor.numel() * tensor.dtype.itemsize for name, tensor in model.state_dict().items()}


def open_pipeline(root: Path, dtypes: dict[str, torch.dtype], **options: Any) -> Any:
    """``DiffusionPipeline.from_pretrained`` with each part in the dtype that is named for it."""
    diffusers = importlib.import_module("diffusers")
    return diffusers.DiffusionPipeline.from_pretrained(
        str(root), torch_dtype={**dtypes, "default": torch.float32}, local_files_only=True, **options
    )


def part_dtypes(root: Path, variant: str | None) -> dict[str, torch.dtype]:
    """The dtype that each folder of a pipeline is stored in."""
    folders = [path for path in sorted(root.iterdir()) if path.is_dir()]
    return {path.name: dtype for path in folders if (dtype := stored_dtype(path, variant)) is not None}


def run_code(code: str) -> Any:
    """The pipeline or model that the card's code leaves."""
    names: dict[str, Any] = {}
    exec(compile(code, "<load code>", "exec"), names)
    return names.get("pipe", names.get("model"))
