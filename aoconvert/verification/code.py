"""The code that opens a checkpoint: what a model card shows is what ``verify`` executes.

Every value that goes into it was checked by ``target`` and is written as a Python literal.
"""

from __future__ import annotations

from typing import Literal

from aoconvert.models import join
from aoconvert.verification.target import Part, Target

Strategy = Literal["from-pretrained", "assign"]


def load_code(target: Target, place: str, strategy: Strategy) -> str:
    """Python that leaves the pipeline in ``pipe``, or the model in ``model``.

    Args:
        target: the checkpoint.
        place: folder or repo id that the code shall open; ``assign`` needs a folder.
        strategy: ``from-pretrained``: plain library code. ``assign``: an empty model from the config, and
            ``load_state_dict(assign=True)``, for what the libraries cannot open themselves.
    """
    lines = ["import torch", *(f"import {name}" for name in target.imports)]
    if strategy == "from-pretrained":
        lines += _from_pretrained(target, place)
    else:
        lines += _assign(target, place)
    return "\n".join(lines) + "\n"


def _from_pretrained(target: Target, place: str) -> list[str]:
    if target.kind == "pipeline":
        arguments = "".join(f", {item}" for item in _dtype(target))
        return [
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({place!r}{arguments})",
        ]
    [part] = target.parts
    arguments = "".join(f", {item}" for item in _kwargs(part))
    return [
        f"from {part.library} import {part.class_name}",
        "",
        f"model = {part.class_name}.from_pretrained({place!r}{arguments})",
    ]


def _assign(target: Target, place: str) -> list[str]:
    lines = ["from accelerate import init_empty_weights"]
    names = sorted({(part.library, part.class_name) for part in target.parts})
    lines += [f"from {library} import {class_name}" for library, class_name in names]
    if any(part.library == "transformers" for part in target.parts):
        lines.append("from transformers import AutoConfig")
    if target.kind == "pipeline":
        lines.append("from diffusers import DiffusionPipeline")
    for part in target.parts:
        lines += ["", *_assign_part(part, place)]
    if target.kind == "pipeline":
        given = "".join(f", {part.name}={part.name}" for part in target.parts)
        arguments = "".join(f", {item}" for item in _dtype(target))
        lines += ["", f"pipe = DiffusionPipeline.from_pretrained({place!r}{given}{arguments})"]
    return lines


def _assign_part(part: Part, place: str) -> list[str]:
    variable = part.name or "model"
    folder = join(place, part.folder) if part.folder else place
    lines = []
    if part.library == "diffusers":
        lines += [
            f"config = {part.class_name}.load_config({folder!r})",
            "with init_empty_weights():",
            f"    {variable} = {part.class_name}.from_config(config)",
        ]
    else:
        lines += [
            f"config = AutoConfig.from_pretrained({folder!r})",
            "with init_empty_weights():",
            f"    {variable} = {part.class_name}(config)",
        ]
    lines += ["state = {}"]
    lines += [f"state.update(torch.load({join(place, file)!r}, weights_only=True, mmap=True))" for file in part.files]
    if part.library == "transformers":
        lines += [
            f"for name, origin in {variable}.all_tied_weights_keys.items():",
            "    state[name] = state[origin]",
        ]
    lines += [f"{variable}.load_state_dict(state, strict=True, assign=True)"]
    if part.library == "transformers":
        lines += [f"{variable}.tie_weights()"]
    lines += [f"{variable}.eval()"]
    return lines


def _dtype(target: Target) -> list[str]:
    dtypes = {str(part.kwargs["torch_dtype"]) for part in target.parts if "torch_dtype" in part.kwargs}
    dtypes |= {part.dtype for part in target.parts if part.dtype is not None}
    return [f"torch_dtype=torch.{dtypes.pop()}"] if len(dtypes) == 1 else []


def _kwargs(part: Part) -> list[str]:
    items = []
    for name, value in part.kwargs.items():
        items.append(f"torch_dtype=torch.{value}" if name == "torch_dtype" else f"{name}={value!r}")
    return items
