"""Published models without their data: the configs of ``fixtures/published`` beside weights files of headers and holes.

A header holds the names, shapes and dtypes of the library's own empty model, split over files as the library splits
what it saves. The data is a hole in a sparse file: it takes no disk, and reads as zeros.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "published"
_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def read_weights() -> dict[str, dict[str, dict[str, Any]]]:
    """What is known of the weights files: model → component → dtype, most bytes per file, files, parameters."""
    return json.loads((PUBLISHED / "weights.json").read_text())  # type: ignore[no-any-return]


def copy_published(name: str, root: Path) -> Path:
    """Put ``root/name`` there, as large as the published repo looks; never written to by a plan.

    Args:
        name: of the repo, such as ``THUDM/CogVideoX-5b``.
        root: folder of all of them.
    """
    folder = root / name
    shutil.copytree(PUBLISHED / name, folder)
    for component, weights in read_weights()[name].items():
        part = folder / component
        config = json.loads((part / "config.json").read_text())
        prefix = weights.get("prefix", "")  # of the names in the files, which today's class no longer has
        tensors = {prefix + key: t for key, t in _empty_tensors(config, _NAMES[weights["dtype"]]).items()}
        stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
        if weights.get("format") == "bin":
            _write_bin(part / "pytorch_model.bin", tensors)
        else:
            _write_safetensors(part, stem, tensors, weights["max_shard_size"])
    _add_tokenizers(folder)
    return folder


def _add_tokenizers(folder: Path) -> None:
    """Parts that ``model_index.json`` names and the fixtures lack have no weights: their place is held."""
    index = folder / "model_index.json"
    for part, names in json.loads(index.read_text()).items() if index.exists() else ():
        if not part.startswith("_") and not (folder / part).exists():
            (folder / part).mkdir()
            (folder / part / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": names[1]}))


def _empty_tensors(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The state dict of the config's model on ``meta``; of names of one parameter the first."""
    import torch

    with torch.device("meta"):
        model = _diffusers_model(config) if "_class_name" in config else _transformers_model(config)
    model = model.to(getattr(torch, dtype))
    once: dict[int, str] = {}
    for parameter, tensor in model.named_parameters(remove_duplicate=False):
        once.setdefault(id(tensor), parameter)
    names = {key for key, _ in model.named_parameters(remove_duplicate=False)} - set(once.values())
    return {key: tensor for key, tensor in model.state_dict().items() if key not in names}


def _diffusers_model(config: dict[str, Any]) -> Any:
    import diffusers

    return getattr(diffusers, config["_class_name"]).from_config(config)


def _transformers_model(config: dict[str, Any]) -> Any:
    import transformers

    values = {key: value for key, value in config.items() if key != "model_type"}
    cls = getattr(transformers, config["architectures"][0])
    return cls(cls.config_class.from_dict(values))


def _write_safetensors(folder: Path, stem: str, tensors: dict[str, Any], most: str) -> None:
    """Write the files that ``save_pretrained(max_shard_size=most)`` writes, and their index."""
    from huggingface_hub import split_torch_state_dict_into_shards

    pattern = f"{stem}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=most)
    for file, names in split.filename_to_tensors.items():
        _write_header(folder / file, {name: tensors[name] for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_header(path: Path, tensors: dict[str, Any]) -> None:
    """Write a safetensors file, its data a hole, laid out as by its library: wide dtypes first, then by name."""
    import torch

    spelled = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": spelled[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + offset)


def _write_bin(path: Path, tensors: dict[str, Any]) -> None:
    """Write a torch file without data."""
    import torch

    with torch.serialization.skip_data():
        torch.save({name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items()}, path)
