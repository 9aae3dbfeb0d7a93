"""What a pipeline of diffusers hands to its parts, in its own call at the smallest sizes."""

from __future__ import annotations

import contextlib
import inspect
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .blanks import given
from .library import PROMPT, Start, plain_image

SECONDS = 30.0
_SIDES = (64, 32, 128)  # pixels: of latents, patches and tiles of patches at least one is left
_IMAGES = "image", "input_image", "control_image", "video", "mask_image", "reference_image"


class _Over(BaseException):
    """Every part has had its input, or the time is up: nothing of the pipeline's is to catch it."""


def from_pipeline(
    pipe: Any,
    parts: Mapping[str, nn.Module],
    seconds: float = SECONDS,
    calls: Iterable[Mapping[str, Any]] | None = None,
) -> dict[str, Start]:
    """Call a pipeline, and keep the first input of each part.

    The call ends with the last part's first input. What goes wrong in it is no error: a part without an input here
    gets one in another way.

    Args:
        pipe: opened by diffusers.
        parts: name → the model.
        seconds: how long it may take, in time of the processor; looked at whenever a layer begins.
        calls: arguments of the call to try in turn; by default :func:`list_calls`.
    """
    until, found = time.thread_time() + seconds, dict[str, Start]()
    with _watch(parts, found, until):
        for arguments in list_calls(pipe) if calls is None else calls:
            try:
                with torch.random.fork_rng(devices=[]), torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
                    torch.manual_seed(0)
                    pipe(**arguments)
                break
            except _Over:
                break
            except Exception:  # whatever a pipeline raises for a size that it does not take
                continue
    return found


@contextlib.contextmanager
def _watch(parts: Mapping[str, nn.Module], found: dict[str, Start], until: float) -> Iterator[None]:
    """Keep what the parts are given, and end the call when there is no more to keep."""

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        if time.thread_time() > until:
            raise _Over

    def keeper(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = _name_arguments(module, args, kwargs)
            if name not in found and state is not None:
                found[name] = Start("pipeline", given(state))
            if len(found) == len(parts):
                raise _Over

        return keep

    hooks = [register_module_forward_pre_hook(look)]
    hooks += [part.register_forward_pre_hook(keeper(name), with_kwargs=True) for name, part in parts.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _name_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments by their names; ``None`` where they cannot be given a second time."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    kinds = {name: parameter.kind for name, parameter in bound.signature.parameters.items()}
    state: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if kinds[name] is inspect.Parameter.VAR_POSITIONAL:
            return None
        state |= value if kinds[name] is inspect.Parameter.VAR_KEYWORD else {name: value}
    return state if all(_lasts(value) for value in state.values()) else None


def _lasts(value: Any) -> bool:
    """Whether a pass leaves the value as it was: a cache, or a generator, is another one afterwards."""
    if isinstance(value, Mapping):
        return all(_lasts(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_lasts(item) for item in value)
    return value is None or isinstance(value, (torch.Tensor, torch.dtype, torch.device, int, float, str))


def list_calls(
    pipe: Any, size: tuple[int, int] | None = None, *, frames: int = 9, steps: int = 1, batch: int = 1
) -> Iterator[dict[str, Any]]:
    """Arguments of the call: of a text alone, and then with images too, in growing sizes.

    Args:
        pipe: opened by diffusers.
        size: width and height in pixels; ``None``: small ones that a pipeline may take.
        frames: of a video.
        steps: of the denoiser.
        batch: how many texts.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    prompt: Any = PROMPT if batch == 1 else [PROMPT] * batch
    for width, height in [size] if size is not None else [(side, side) for side in _SIDES]:
        sizes: dict[str, Any] = {"height": height, "width": width, "num_frames": frames, "video_length": frames}
        sizes |= {"prompt": prompt, "output_type": "latent", "use_resolution_binning": False, **_text_length(pipe)}
        sizes |= {"num_inference_steps": steps}
        call = {name: value for name, value in sizes.items() if name in parameters}
        images = {name: plain_image(min(width, height)) for name in _IMAGES if name in parameters}
        required = {
            name: image for name, image in images.items() if parameters[name].default is inspect.Parameter.empty
        }
        yield {**call, **required}
        if len(images) > len(required):
            yield {**call, **images}


def _text_length(pipe: Any) -> dict[str, int]:
    """The length of a text that a part was built for, where it says so."""
    configs = [part.config for part in pipe.components.values() if isinstance(part, nn.Module)]
    given = {getattr(config, "max_text_seq_length", None) for config in configs}
    lengths = [length for length in given if isinstance(length, int)]
    return {"max_sequence_length": lengths[0]} if len(lengths) == 1 else {}
