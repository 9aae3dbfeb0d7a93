"""Runs in a fresh interpreter, without aoconvert: opens the checkpoint with the code a user is given, and looks at it.

Reads one JSON request from stdin: ``code`` (which leaves ``pipe`` or ``model``), ``parts`` (name → ``{tensor: [class,
sha256]}`` of what must be quantized, hashes null without a manifest), ``forward``, ``example`` (code that uses what was
opened, or null). Writes JSON lines: ``{"loaded": ...}``, ``{"part": ..., "problems": [...]}``, ``{"forward": ...}``,
``{"error": ...}``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from typing import Any

import torch


def main() -> None:
    """Answer the request on stdin."""
    request = json.load(sys.stdin)
    names: dict[str, Any] = {}
    try:
        exec(compile(request["code"], "<load code>", "exec"), names)
        whole: Any = names.get("pipe", names.get("model"))
        models = {part: getattr(whole, part) if part else whole for part in request["parts"]}
    except Exception as error:
        say({"error": root_cause(error)})
        return
    say({"loaded": type(whole).__name__})
    for part, expected in request["parts"].items():
        say({"part": part, "problems": compare(models[part], expected)})
    if request["forward"]:
        for part, model in models.items():
            say({"part": part, "forward": attempt_forward(model)})
    if request["example"] is not None:
        say({"example": True, "forward": attempt_example(request["example"], names)})


def root_cause(error: BaseException) -> str:
    """The first error of the chain: diffusers hides an UnpicklingError behind an OSError."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def compare(model: Any, expected: dict[str, list[str | None]]) -> list[str]:
    """What differs from what was written, and what has no data."""
    problems = []
    state = model.state_dict()
    digests: dict[Any, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            problems.append(f"{name} is on meta")
    for name, (class_name, sha256) in expected.items():
        tensor = state.get(name)
        if tensor is None:
            problems.append(f"{name} is not in the model")
            continue
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        if kind != class_name:
            problems.append(f"{name} is a {type(tensor).__name__}, not a {str(class_name).rpartition('.')[2]}")
        elif sha256 is not None and digest_of(tensor, digests) != sha256:
            problems.append(f"{name} changed while it was loaded")
    return problems


def digest_of(tensor: Any, known: dict[Any, str]) -> str:
    """Its content hash; what has many names is read once."""
    key = place(tensor)
    if key not in known:
        known[key] = content(tensor).hexdigest()
    return known[key]


def place(tensor: Any) -> tuple[Any, ...]:
    """Where in memory the elements lie: the same for tensors that share all of them."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    return tuple(place(getattr(tensor, name)) for name in flatten()[0])


def content(tensor: Any, digest: Any = None) -> Any:
    """SHA-256 over the inner tensors' bytes, in order."""
    digest = hashlib.sha256() if digest is None else digest
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        for name in flatten()[0]:
            content(getattr(tensor, name), digest)
    elif tensor.numel():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest


def attempt_example(code: str, names: dict[str, Any]) -> dict[str, str]:
    """Run the example of the model card where the load code left off; what it prints or writes is not kept."""
    torch.manual_seed(0)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(code, "<example>", "exec"), names)
    except ImportError as error:  # writing a video takes a package that opening the checkpoint does not
        return {"status": "skipped", "detail": f"the card's example was not run: {root_cause(error)}"}
    except Exception as error:
        return {"status": "failed", "detail": f"the card's example failed: {root_cause(error)}"}
    return {"status": "passed", "detail": "the card's example ran"}


def attempt_forward(model: Any) -> dict[str, str]:
    """One forward pass with a batch of one: ``{"status", "detail"}``."""
    torch.manual_seed(0)
    try:
        inputs = forward_inputs(model)
    except Exception as error:
        return {"status": "skipped", "detail": f"no synthetic input for {type(model).__name__} ({error})"}
    if inputs is None:
        return {"status": "skipped", "detail": f"{type(model).__name__} is not a family that this check knows"}
    try:
        with torch.no_grad():
            output = model(**on_device(inputs, model.device))
    except Exception as error:
        return {"status": "failed", "detail": f"the forward pass of {type(model).__name__} failed: {root_cause(error)}"}
    values = output[0] if not hasattr(output, "last_hidden_state") else output.last_hidden_state
    if not bool(torch.isfinite(values).all()):
        return {"status": "failed", "detail": f"the output of {type(model).__name__} is not finite"}
    return {"status": "passed", "detail": f"{type(model).__name__}: output {list(values.shape)}, finite"}


def on_device(inputs: dict[str, Any], device: Any) -> dict[str, Any]:
    """The inputs on the model's device."""
    return {
        name: value.to(device)
        if isinstance(value, torch.Tensor)
        else on_device(value, device)
        if isinstance(value, dict)
        else value
        for name, value in inputs.items()
    }


def forward_inputs(model: Any) -> dict[str, Any] | None:
    """A small input made from the model's config, or ``None`` for a family that is not known."""
    if hasattr(model, "main_input_name"):
        return transformers_inputs(model)
    make = _DIFFUSERS.get(type(model).__name__)
    if make is None:
        return None
    dtype = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point and p.dtype != torch.float32)
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in make(model.config).items()
    }


def transformers_inputs(model: Any) -> dict[str, Any] | None:
    """Token ids for a text model, pixels for a vision model."""
    config = model.config
    if model.main_input_name == "input_ids":
        ids = torch.arange(2, 26).reshape(1, 24) % text_vocabulary(config)
        inputs = {"input_ids": ids}
        if getattr(config, "is_encoder_decoder", False) and "Encoder" not in type(model).__name__:
            inputs["decoder_input_ids"] = ids
        return inputs
    if model.main_input_name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        return {
            "pixel_values": torch.randn(1, vision.num_channels, vision.image_size, vision.image_size, dtype=model.dtype)
        }
    return None


def text_vocabulary(config: Any) -> int:
    """Number of token ids."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text.vocab_size)


def _cogvideox(c: Any) -> dict[str, Any]:
    side = c.patch_size * 4
    frames = c.patch_size_t or 1
    if c.use_learned_positional_embeddings:
        frames = (c.sample_frames - 1) // c.temporal_compression_ratio + 1
        height, width = c.sample_height, c.sample_width
    else:
        height = width = side
    return {
        "hidden_states": torch.randn(1, frames, c.in_channels, height, width),
        "encoder_hidden_states": torch.randn(1, c.max_text_seq_length, c.text_embed_dim),
        "timestep": torch.tensor([10]),
    }


def _flux(c: Any) -> dict[str, Any]:
    inputs = {
        "hidden_states": torch.randn(1, 16, c.in_channels),
        "encoder_hidden_states": torch.randn(1, 8, c.joint_attention_dim),
        "pooled_projections": torch.randn(1, c.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    return {**inputs, "guidance": torch.tensor([3.5])} if c.guidance_embeds else inputs


def _pixart(c: Any) -> dict[str, Any]:
    side = c.patch_size * 4
    conditions = None
    if c.use_additional_conditions or (c.use_additional_conditions is None and c.sample_size == 128):
        conditions = torch.tensor([[float(side), float(side)]])
    return {
        "hidden_states": torch.randn(1, c.in_channels, side, side),
        "encoder_hidden_states": torch.randn(1, 8, c.caption_channels),
        "timestep": torch.tensor([10]),
        "added_cond_kwargs": {
            "resolution": conditions,
            "aspect_ratio": None if conditions is None else torch.tensor([[1.0]]),
        },
    }


def _sd3(c: Any) -> dict[str, Any]:
    side = c.patch_size * 4
    return {
        "hidden_states": torch.randn(1, c.in_channels, side, side),
        "encoder_hidden_states": torch.randn(1, 8, c.joint_attention_dim),
        "pooled_projections": torch.randn(1, c.pooled_projection_dim),
        "timestep": torch.tensor([10]),
    }


def _wan(c: Any) -> dict[str, Any]:
    frames, height, width = c.patch_size
    inputs = {
        "hidden_states": torch.randn(1, c.in_channels, frames, height * 4, width * 4),
        "encoder_hidden_states": torch.randn(1, 8, c.text_dim),
        "timestep": torch.tensor([10]),
    }
    if c.image_dim is not None:
        inputs["encoder_hidden_states_image"] = torch.randn(1, 257, c.image_dim)
    return inputs


def _qwen_image(c: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16, c.in_channels),
        "encoder_hidden_states": torch.randn(1, 8, c.joint_attention_dim),
        "encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
    }


_DIFFUSERS = {
    "CogVideoXTransformer3DModel": _cogvideox,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "WanTransformer3DModel": _wan,
    "QwenImageTransformer2DModel": _qwen_image,
}


def say(value: dict[str, Any]) -> None:
    """One line of the answer."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
