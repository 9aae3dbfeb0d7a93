"""One call of a pipeline: its arguments, what its models are given and give there, its latents and pictures."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from aoconvert import inputs
from aoconvert.evaluation.children.samples import BadInputs
from aoconvert.evaluation.figures import NotFiniteError, SampleFigures, compare_vectors, compare_whole

MOST_CALLS = 4
"""Calls of a model that are kept for each sample, evenly spaced over all of them."""

_PLAIN = (type(None), bool, int, float, str, torch.dtype)


class LatentsNotFinite(NotFiniteError):
    """The latents of a pipeline hold NaN or infinity."""

    def __init__(self, whose: str) -> None:
        super().__init__(whose)
        self.args = (f"the latents of the {whose} pipeline are not finite",)


@dataclass(frozen=True)
class Wishes:
    """What is to be made: ``seeds`` of each of ``prompts``, from ``seed`` on."""

    prompts: tuple[str, ...]
    own_prompts: bool
    seeds: int
    seed: int
    steps: int
    size: tuple[int, int] | None


@dataclass(frozen=True)
class Sample:
    """A prompt, where the pipeline takes one, and a seed."""

    prompt: str | None
    seed: int


@dataclass(frozen=True)
class Ran:
    """What a pipeline gave: its final latents, and its pictures as 8-bit (pictures, height, width, 3)."""

    latents: torch.Tensor | None
    pictures: torch.Tensor | None


def list_samples(pipe: Any, wishes: Wishes) -> list[Sample]:
    """Each prompt with each seed.

    Raises:
        BadInputs: prompts for a pipeline that takes none.
    """
    prompts: list[str | None] = [*wishes.prompts]
    if "prompt" not in inspect.signature(type(pipe).__call__).parameters:
        if wishes.own_prompts:
            raise BadInputs(f"{type(pipe).__name__} takes no prompts", "omit --prompts")
        prompts = [None]
    return [Sample(prompt, wishes.seed + number) for prompt in prompts for number in range(wishes.seeds)]


def list_arguments(pipe: Any, wishes: Wishes) -> list[dict[str, Any]]:
    """Arguments of the call to try in turn, without prompt and seed."""
    return [
        {**found, **({"output_type": "np"} if "output_type" in found else {})}
        for found in inputs.list_calls(pipe, wishes.size, steps=wishes.steps)
    ]


def describe_arguments(arguments: Mapping[str, Any]) -> str:
    """Steps and sizes."""
    words = [f"{arguments['num_inference_steps']} steps"] if "num_inference_steps" in arguments else []
    if "width" in arguments and "height" in arguments:
        words.append(f"{arguments['width']}x{arguments['height']}")
    if (frames := arguments.get("num_frames", arguments.get("video_length"))) is not None:
        words.append(f"{frames} frames")
    return ", ".join(words).replace("1 steps", "1 step")


def run_pipeline(pipe: Any, arguments: Mapping[str, Any], sample: Sample, whose: str) -> Ran:
    """Call a pipeline.

    Raises:
        NotFiniteError: NaN or infinity in its latents or pictures.
    """
    given = dict(arguments)
    if sample.prompt is not None:
        given["prompt"] = sample.prompt
    if "generator" in inspect.signature(type(pipe).__call__).parameters:
        given["generator"] = torch.Generator().manual_seed(sample.seed)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(sample.seed)
    with _watch_latents(pipe) as seen, torch.no_grad(), np.errstate(invalid="ignore"):
        output = pipe(**given)
    latents = seen[-1].cpu() if seen else None
    if latents is not None and not bool(latents.isfinite().all()):
        raise LatentsNotFinite(whose)
    return Ran(latents, _read_pictures(output, whose))


@contextlib.contextmanager
def _watch_latents(pipe: Any) -> Iterator[list[torch.Tensor]]:
    """Note what the scheduler makes of each step; the last of it is final."""
    seen: list[torch.Tensor] = []
    scheduler = getattr(pipe, "scheduler", None)
    step = getattr(scheduler, "step", None)
    if step is None:
        yield seen
        return

    def note(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        seen[:] = [tensor.detach() for tensor in inputs.first_tensors(output)[:1]]
        return output

    vars(scheduler)["step"] = note
    try:
        yield seen
    finally:
        vars(scheduler).pop("step", None)


def _read_pictures(output: Any, whose: str) -> torch.Tensor | None:
    """Images, or the frames of videos, rounded to 8 bits as diffusers saves them; ``None`` where there are none."""
    found = next((value for name in ("frames", "images") if (value := getattr(output, name, None)) is not None), None)
    if found is None or len(found) == 0:
        return None
    try:
        values = np.asarray(found, dtype=None if isinstance(found, np.ndarray) else np.float32)
    except (TypeError, ValueError):
        return None
    if values.ndim < 4 or values.shape[-1] not in (1, 3, 4):
        return None
    values = values.reshape(-1, *values.shape[-3:])[..., :3].astype(np.float32)
    if not np.isfinite(values).all():
        raise NotFiniteError(whose)
    if values.shape[-1] == 1:
        values = values.repeat(3, axis=-1)
    if not isinstance(found, np.ndarray):  # PIL's
        values /= 255
    return torch.from_numpy(np.ascontiguousarray((values * 255).round().clip(0, 255).astype(np.uint8)))


@contextlib.contextmanager
def record_calls(parts: Mapping[str, nn.Module], folder: Path) -> Iterator[None]:
    """Write each call of the parts to ``PART-NUMBER.pt``: its arguments, and the first tensor of what it gives.

    At the end :data:`MOST_CALLS` of each part stay. A call whose arguments do not last (a cache) is left out.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for earlier in folder.glob("*.pt"):
        earlier.unlink()
    given: dict[str, list[Any]] = {name: [] for name in parts}
    count = dict.fromkeys(parts, 0)

    def take(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                given[name][:] = [{"args": _copy(args), "kwargs": _copy(kwargs)}]
            except TypeError:
                given[name].clear()

        return note

    def write(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            number, count[name] = count[name], count[name] + 1
            if given[name] and (found := inputs.first_tensors(output)):
                call = {**given[name].pop(), "output": found[0].detach().cpu().clone(), "call": number}
                torch.save(call, folder / f"{name}-{number:04d}.pt")

        return note

    handles = [part.register_forward_pre_hook(take(name), with_kwargs=True) for name, part in parts.items()]
    handles += [part.register_forward_hook(write(name)) for name, part in parts.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name in parts:
        found = list_calls(folder, name)
        places = np.linspace(0, len(found) - 1, min(MOST_CALLS, len(found))).round().astype(int)
        for path in set(found) - {found[place] for place in places}:
            path.unlink()


def list_calls(folder: Path, name: str) -> list[Path]:
    """The calls of a part that are kept, in their order."""
    return sorted(folder.glob(f"{name}-[0-9][0-9][0-9][0-9].pt"))


def read_call(path: Path) -> dict[str, Any]:
    """A call that was kept."""
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def repeat_call(part: Any, call: Mapping[str, Any]) -> torch.Tensor:
    """Give a model what the original was given, and take the first tensor of what it makes of that."""
    device = next((tensor.device for tensor in part.parameters() if not tensor.is_meta), torch.device("cpu"))
    args, kwargs = (_place(call[key], device) for key in ("args", "kwargs"))
    torch.manual_seed(0)
    with torch.no_grad():
        output = part(*args, **kwargs)
    return inputs.first_tensors(output)[0].cpu()


def compare_calls(task: str, before: torch.Tensor, after: torch.Tensor) -> SampleFigures:
    """Compare what a model of a pipeline gave with what the original gave.

    Raises:
        NotFiniteError: NaN or infinity in one of them.
        ValueError: they have different shapes.
    """
    if before.shape != after.shape:
        shapes = f"{list(before.shape)}, the quantized one {list(after.shape)}"
        raise ValueError(f"the original gives {shapes}: they are different models")
    if task == "denoiser":
        return compare_whole(before, after)
    return compare_vectors(*(values.reshape(-1, values.shape[-1]) for values in (before, after)))


def _copy(value: Any) -> Any:
    """Tensors copied to the CPU.

    Raises:
        TypeError: something that cannot be given a second time.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {name: _copy(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_copy(item) for item in value)
    if isinstance(value, _PLAIN):
        return value
    raise TypeError(type(value).__name__)


def _place(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _place(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_place(item, device) for item in value)
    return value
