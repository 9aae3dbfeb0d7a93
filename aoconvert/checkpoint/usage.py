"""An example of use for a model card: what comes after the load code.

Whether a pipeline makes images or videos out of a text is read off its ``__call__``; there is no list of classes. What
is neither gets no example: a wrong one is worse than none.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from aoconvert.checkpoint.checkpoint import Checkpoint, Part
from aoconvert.files import read_limited
from aoconvert.json_text import CONFIG_BYTES, parse_json
from aoconvert.models.calls import Default

PROMPT = "A red panda reads a book beside a window on a rainy day"
_QUESTION = "Why is the sky blue?"
_SENTENCES = ["The cat sits on the sofa.", "A cat is lying on the couch."]

# inputs that a text alone cannot replace; what only tunes an image or video that is made has other names
_OTHER_INPUTS = re.compile(
    r"(input_|reference_|control_|mask_|last_)?(image|video|images|audio)|control.*|condition.*|.*_frames_input|mask"
    r"|lyrics|token_indices|gligen.*|source_.*|target_.*|image_embeds|image_embeddings|.*_indices|cond_.*|video_length"
)
_HALVES = re.compile(r"Prior|Decoder|LDM3D")


def usage_code(target: Checkpoint, place: str, *, small: bool = False, revision: str | None = None) -> str | None:
    """Python that uses ``pipe`` or ``model`` after the load code; ``None`` for a kind that has no plain example.

    Args:
        target: the checkpoint.
        place: folder or repo id that was opened; a tokenizer is read from it.
        small: one step at the smallest sizes, for a check that it runs at all.
        revision: of a repo, where it is not the default branch.
    """
    if target.kind == "pipeline":
        lines = _pipeline(target, small=small)
    elif target.kind == "transformers":
        opened = repr(place) if revision is None else f"{place!r}, revision={revision!r}"
        lines = _transformers(target, target.parts[0], opened, small=small)
    else:
        return None
    return "\n".join(lines) + "\n" if lines else None


def usage_sha256(target: Checkpoint) -> str | None:
    """SHA-256 (hex) of the example before place and sizes are filled in: by it a card knows that it was run."""
    usage = usage_code(target, "")
    return hashlib.sha256(usage.encode()).hexdigest() if usage is not None else None


def usage_packages(usage: str | None) -> tuple[str, ...]:
    """What an example needs beyond the libraries: diffusers writes a video by way of these."""
    return ("imageio", "imageio-ffmpeg") if usage is not None and "export_to_video" in usage else ()


def _pipeline(target: Checkpoint, *, small: bool) -> list[str] | None:
    parameters = _parameters(target)
    if parameters is None or "prompt" not in parameters or any(_OTHER_INPUTS.fullmatch(name) for name in parameters):
        return None
    video = "num_frames" in parameters
    image = {"height", "width", "num_images_per_prompt"} <= set(parameters)
    if not (video or image) or _HALVES.search(target.class_name):
        return None
    arguments = _arguments(target, parameters, small=small)
    call = ", ".join(["prompt", *(f"{name}={value!r}" for name, value in arguments.items())])
    lines = [f"prompt = {PROMPT!r}"]
    if video:
        return [
            "from diffusers.utils import export_to_video",
            "",
            *lines,
            f"frames = pipe({call}).frames[0]",
            'export_to_video(frames, "video.mp4")',
        ]
    return [*lines, f"image = pipe({call}).images[0]", 'image.save("image.png")']


def _parameters(target: Checkpoint) -> Mapping[str, Default] | None:
    """What the pipeline's ``__call__`` takes: as the manifest has it, else as diffusers does."""
    recorded = target.manifest.pipeline if target.manifest is not None else None
    if recorded is not None and recorded.class_name == target.class_name:
        return recorded.call
    from aoconvert.models.calls import call_parameters

    return call_parameters(target.class_name)


def _arguments(target: Checkpoint, parameters: Mapping[str, Default], *, small: bool) -> dict[str, Any]:
    """What the call needs beyond the prompt: a text length that the model was built for, and small sizes."""
    arguments: dict[str, Any] = {}
    lengths = {part.config.get("max_text_seq_length") for part in target.parts} - {None}
    if "max_sequence_length" in parameters and len(lengths) == 1 and isinstance(found := lengths.pop(), int):
        arguments |= {"max_sequence_length": found} if found != parameters["max_sequence_length"] else {}
    if small:
        sizes = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 1, "use_resolution_binning": False}
        arguments |= {name: value for name, value in sizes.items() if name in parameters}
    return arguments


def _transformers(target: Checkpoint, part: Part, opened: str, *, small: bool) -> list[str] | None:
    if not any((target.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    limit = 2 if small else 100
    trust = ", trust_remote_code=True" if part.runs_code else ""
    head = ["from transformers import AutoTokenizer", "", f"tokenizer = AutoTokenizer.from_pretrained({opened}{trust})"]
    name = part.class_name
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return head + _causal(_has_chat_template(target), limit)
    if name.endswith("ForConditionalGeneration") and part.config.get("is_encoder_decoder"):
        return [
            *head,
            f'inputs = tokenizer({_QUESTION!r}, return_tensors="pt").to(device)',
            f"tokens = model.generate(**inputs, max_new_tokens={limit})",
            "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
        ]
    if name.endswith(("EncoderModel", "Model")) and not part.config.get("vision_config"):
        return [
            *head,
            f"sentences = {_SENTENCES!r}",
            'inputs = tokenizer(sentences, padding=True, return_tensors="pt").to(device)',
            "with torch.no_grad():",
            "    hidden = model(**inputs).last_hidden_state",
            'mask = inputs["attention_mask"].unsqueeze(-1)',
            "embeddings = (hidden * mask).sum(1) / mask.sum(1)  # the mean over each sentence's tokens",
            "print(torch.nn.functional.cosine_similarity(embeddings[0], embeddings[1], dim=0))",
        ]
    return None


def _causal(chat: bool, limit: int) -> list[str]:
    if not chat:
        return [
            'inputs = tokenizer("The sky is blue because", return_tensors="pt").to(device)',
            f"tokens = model.generate(**inputs, max_new_tokens={limit})",
            "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
        ]
    return [
        f'messages = [{{"role": "user", "content": {_QUESTION!r}}}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ").to(device)",
        f"tokens = model.generate(**inputs, max_new_tokens={limit})",
        'print(tokenizer.decode(tokens[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _has_chat_template(target: Checkpoint) -> bool:
    if (target.folder / "chat_template.jinja").is_file():
        return True
    config = target.folder / "tokenizer_config.json"
    try:
        return bool(parse_json(read_limited(config, CONFIG_BYTES)).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False
