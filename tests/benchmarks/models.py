"""A CogVideoX-2b transformer with random weights, streamed to disk: `python models.py --layers 30 FOLDER`.

The safetensors file is written a piece at a time from one 8 MB block of normal values, every tensor from another place
in it, so building a 3.4 GB model takes seconds and little memory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel

# transformer/config.json of THUDM/CogVideoX-2b
CONFIG = {
    "num_attention_heads": 30,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 512,
    "text_embed_dim": 4096,
    "num_layers": 30,
    "sample_width": 90,
    "sample_height": 60,
    "sample_frames": 49,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 226,
}
_BLOCK = 1 << 22  # values
_STRIDE = 7919  # a prime: no two tensors start at the same value


def build(folder: Path, layers: int) -> int:
    """Write the model in bfloat16 to ``folder``; returns its number of parameters."""
    with init_empty_weights(include_buffers=True):
        model = CogVideoXTransformer3DModel(**{**CONFIG, "num_layers": layers})
    model.save_config(folder)
    tensors = model.state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        size = 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(_BLOCK, generator=generator).mul_(0.02).to(torch.bfloat16)
    block = values.view(torch.uint8).numpy().data
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, tensor in enumerate(tensors.values()):
            left, start = 2 * tensor.numel(), 2 * (number * _STRIDE % _BLOCK)
            while left:
                piece = block[start : start + left]
                file.write(piece)
                left, start = left - piece.nbytes, 0
    return sum(tensor.numel() for tensor in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=CONFIG["num_layers"], help="112 MB each")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    count = build(options.folder, options.layers)
    print(f"{options.folder}: {count / 1e9:.2f} billion parameters")


if __name__ == "__main__":
    main()
