"""What is run, by the name of the measurement.

``step``: the denoiser alone, on what its pipeline hands to it; ``call``: the whole pipeline; ``prefill`` and
``decode``: ``generate`` of a language model, to its first token and from there on; ``forward``: one pass of any
other model.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PROCESSOR_SECONDS = 600.0  # for what comes before the denoiser's first step: encoders of a real size


@dataclass(frozen=True)
class Workload:
    """Something to run.

    Attributes:
        run: does it once; returns the seconds that count.
        units: how much of ``unit`` is done in these.
        unit: what is counted.
        described: its sizes.
    """

    run: Callable[[], float]
    units: int
    unit: str
    described: str


def make(whole: Any, part: Any, request: dict[str, Any]) -> Workload:
    """The workload of a request.

    Raises:
        Exception: whatever the libraries raise for it.
    """
    if request["measure"] == "step":
        return make_step(whole, part, request)
    if request["measure"] == "call":
        return make_call(whole, request)
    if request["measure"] in ("prefill", "decode"):
        return make_generation(part, request, decoding=request["measure"] == "decode")
    return make_forward(part, request)


def make_step(pipe: Any, denoiser: Any, request: dict[str, Any]) -> Workload:
    """One forward pass of the denoiser, on the first input that the pipeline's own call hands to it."""
    package = load_inputs()
    calls = package.list_calls(pipe, pixels(request), frames=request["frames"], batch=request["batch_size"])
    handed = package.from_pipeline(pipe, {"": denoiser}, _PROCESSOR_SECONDS, calls).get("")
    if handed is not None:
        found = package.Found(handed.state, denoiser.dtype, 0, "nothing", None, handed.source)
    else:
        found = find_alone(package, denoiser, request)
    return one_pass(denoiser, found, 1, "denoising step", request)


def find_alone(package: Any, model: Any, request: dict[str, Any]) -> Any:
    """Inputs of a model, found without its pipeline.

    Raises:
        RuntimeError: there are none of this size.
    """
    if request["batch_size"] != 1:
        raise RuntimeError("inputs for this model are found for a batch of 1 only")
    if request["size"] is not None:
        raise RuntimeError("inputs for this model are found for a small size only, and --size asks for another")
    return package.find_inputs(model, list(package.from_libraries(model, package.processor_folders(folder(request)))))


def folder(request: dict[str, Any]) -> Path:
    """Where the model is."""
    return Path(request["folder"])


def one_pass(model: Any, found: Any, units: int, unit: str, request: dict[str, Any]) -> Workload:
    """A forward pass with these inputs."""
    inputs = found.make(request["device"])
    return Workload(lambda: seconds(lambda: model(**inputs), request["device"]), units, unit, shapes(inputs))


def shapes(inputs: dict[str, Any]) -> str:
    """The shape of the main input: what is denoised, or else the largest."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        return ""
    known = [name for name in ("hidden_states", "sample", "x") if name in tensors]
    name = known[0] if known else max(tensors, key=lambda item: tensors[item].numel())
    return f"{name} {list(tensors[name].shape)}"


def pixels(request: dict[str, Any]) -> tuple[int, int] | None:
    """Width and height that are asked for."""
    return tuple(request["size"]) if request["size"] is not None else None


def make_call(pipe: Any, request: dict[str, Any]) -> Workload:
    """A whole call of the pipeline, with its decoder: the first of these sizes that it takes."""
    options = {"frames": request["frames"], "steps": request["steps"], "batch": request["batch_size"]}
    failure: Exception | None = None
    for arguments in load_inputs().list_calls(pipe, pixels(request), **options):
        arguments.pop("output_type", None)
        pipe.set_progress_bar_config(disable=True)
        try:
            with torch.no_grad():
                output = pipe(**{**arguments, **one_step(arguments)})
        except Exception as error:  # whatever a pipeline raises for a size that it does not take
            failure = failure or error
            continue
        return whole_call(pipe, arguments, output, request["device"])
    raise failure or RuntimeError("the pipeline cannot be called")


def whole_call(pipe: Any, arguments: dict[str, Any], output: Any, device: str) -> Workload:
    """The call with arguments that it takes; ``output`` is what it gave for one step."""
    unit, units = count_outputs(output)
    return Workload(lambda: seconds(lambda: pipe(**arguments), device), units, unit, describe_call(arguments, unit))


def one_step(arguments: dict[str, Any]) -> dict[str, Any]:
    """To try a size, one step is enough."""
    return {"num_inference_steps": 1} if "num_inference_steps" in arguments else {}


def count_outputs(output: Any) -> tuple[str, int]:
    """What a pipeline gives, and how many."""
    for name, unit in (("frames", "video"), ("images", "image")):
        found = getattr(output, name, None)
        if found is not None:
            return unit, len(found)
    return "call", 1


def describe_call(arguments: dict[str, Any], unit: str) -> str:
    """Steps and sizes of a call."""
    words = [f"{arguments['num_inference_steps']} steps"] if "num_inference_steps" in arguments else []
    if "width" in arguments and "height" in arguments:
        words.append(f"{arguments['width']}x{arguments['height']}")
    if unit == "video" and (frames := arguments.get("num_frames", arguments.get("video_length"))) is not None:
        words.append(f"{frames} frames")
    return ", ".join(words).replace("1 steps", "1 step") if words else ""


def make_generation(model: Any, request: dict[str, Any], *, decoding: bool) -> Workload:
    """``generate`` of the library; of decoding counts what comes after the first token."""
    name = type(model).__name__
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise RuntimeError(f"{name} takes {model.main_input_name}, not a text alone")
    if not model.can_generate():
        raise RuntimeError(f"{name} has no generate")
    batch, tokens = request["batch_size"], request["tokens"]
    ids = draw_ids(model, batch, tokens, request["device"])
    count = tokens + 1 if decoding else 1
    clock = _Clock(request["device"])
    options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False, "num_beams": 1, "pad_token_id": 0}

    def run() -> float:
        clock.stamps.clear()
        began = clock.now()
        model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[clock], **options)
        return clock.stamps[-1] - (clock.stamps[0] if decoding else began)

    described = f"{tokens} tokens after {tokens}" if decoding else f"{tokens} tokens"
    return Workload(run, batch * tokens, "generated token" if decoding else "prompt token", described)


class _Clock:
    """Asked by ``generate`` after each token whether to stop: it never does, and notes the time."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.stamps: list[float] = []

    def now(self) -> float:
        wait_for(self.device)
        return time.perf_counter()

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.stamps.append(self.now())
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def make_forward(model: Any, request: dict[str, Any]) -> Workload:
    """A pass: over sentences where the model takes text, else over inputs that are found for it."""
    batch, tokens, device = request["batch_size"], request["tokens"], request["device"]
    if getattr(model, "main_input_name", None) != "input_ids":
        package = load_inputs()
        return one_pass(model, find_alone(package, model, request), 1, "forward pass", request)
    ids = draw_ids(model, batch, tokens, device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return Workload(lambda: seconds(lambda: model(**inputs), device), batch, "sentence", f"{tokens} tokens")


def draw_ids(model: Any, batch: int, tokens: int, device: str) -> torch.Tensor:
    """Random tokens, the same each time, none of those that mean something."""
    config = model.config.get_text_config()
    settings = {**model.config.to_dict(), **config.to_dict()}
    special = {value for name, value in settings.items() if name.endswith("token_id") and isinstance(value, int)}
    plain = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    chosen = torch.randint(len(plain), (batch, tokens), generator=torch.Generator().manual_seed(0))
    return plain[chosen].to(device)


def seconds(work: Callable[[], Any], device: str) -> float:
    """How long a piece of work takes, to the end of what it started on the device."""
    wait_for(device)
    began = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - began


def wait_for(device: str) -> None:
    """Wait until a GPU has done what it was told."""
    if device != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def load_inputs() -> Any:
    """The package ``inputs``, by its path: nothing else of aoconvert is to be imported here."""
    if "inputs" in sys.modules:
        return sys.modules["inputs"]
    path = Path(__file__).resolve().parents[2] / "inputs" / "__init__.py"
    spec = importlib.util.spec_from_file_location("inputs", path)
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["inputs"] = package
    spec.loader.exec_module(package)
    return package
