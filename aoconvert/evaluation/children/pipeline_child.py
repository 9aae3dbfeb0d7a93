"""Runs in a fresh interpreter: opens one pipeline by diffusers and runs it on the samples, one after the other.

Reads one JSON request from stdin, and writes the lines that ``eval_child`` writes; the last one has ``peak_bytes``.
What is kept of sample N of the original: ``calls-N/`` (calls of its models), ``sample-N.safetensors`` (``latents``,
``pictures``), ``layers-PART-N.safetensors`` (see ``references``), and then ``sample-N.json``, the noise floor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # an isolated interpreter does not look here
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from aoconvert.environment import import_diffusers, quiet_imports

with quiet_imports():
    import torchao.quantization  # noqa: F401

from safetensors.torch import load_file, save_file

from aoconvert.evaluation import pictures
from aoconvert.evaluation.children import eval_child, layers, noise
from aoconvert.evaluation.children.opening import distributes
from aoconvert.evaluation.children.pipeline_calls import (
    Ran,
    Sample,
    Wishes,
    compare_calls,
    describe_arguments,
    list_arguments,
    list_calls,
    list_samples,
    read_call,
    record_calls,
    repeat_call,
    run_pipeline,
)
from aoconvert.evaluation.children.samples import BadInputs
from aoconvert.evaluation.figures import NotFiniteError, compare_whole
from aoconvert.evaluation.references import References, write_json
from aoconvert.humanize import plural
from aoconvert.memory import anonymous_bytes
from aoconvert.verification.children import library_opening
from aoconvert.verification.children.reload_child import say

_LOOK = 0.05  # seconds between two looks at the memory


def main() -> None:
    """Answer the request on stdin; what the model's own code prints is kept off the answers."""
    request = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        eval_child.answer(request, say, RUNS)


def run_original(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Keep what the original gives for the samples that are not done."""
    kept = References(Path(request["folder"]))
    with _Peak(request["device"]) as peak:
        pipe = _place(open_original(request), request)
        parts = find_parts(pipe, request)
        wishes = Wishes(**{**request["wishes"], "prompts": tuple(request["wishes"]["prompts"])})
        samples = list_samples(pipe, wishes)
        for number, sample in enumerate(samples):
            if kept.noise_floor(number) is None:
                arguments = _run_and_record(pipe, parts, wishes, kept, number, sample)
                if kept.data() is None:
                    write_json(kept.folder / "data.json", _describe(wishes, samples, *arguments))
                _keep_layers(parts, request, kept, number, -(-request["rows"] // len(samples)))
                _keep_noise(pipe, parts, request, kept, number, sample, arguments[1])
            yield {"sample": number}
        yield {"peak_bytes": peak.nbytes()}


def run_quantized(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Compare what the quantized pipeline gives, and its models on the original's inputs, with what is kept."""
    kept = References(Path(request["folder"]))
    data = kept.data()
    assert data is not None
    with _Peak(request["device"]) as peak:
        pipe = _place(open_quantized(request), request)
        parts = find_parts(pipe, request)
        wishes = Wishes(**{**request["wishes"], "prompts": tuple(request["wishes"]["prompts"])})
        arguments = list_arguments(pipe, wishes)[data["call"]]
        samples = list_samples(pipe, wishes)
        for number in request["samples"]:
            calls = _repeat_calls(parts, request, kept, number)
            ran = run_pipeline(pipe, arguments, samples[number], "quantized")
            if ran.pictures is not None:
                place = Path(request["result"])
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
                _save(place / f"pictures-{number:04d}.safetensors", Ran(None, ran.pictures))
            yield {"sample": number, "figures": {"calls": calls, **_compare_ran(kept, number, ran, request)}}
        for name, packing in request["layers"].items():
            files = sorted(kept.folder.glob(f"layers-{name}-[0-9][0-9][0-9][0-9].safetensors"))
            for line in layers.measure_layers(parts[name], files, packing) if files else ():
                yield {"layer": line, "part": name}
        yield {"peak_bytes": peak.nbytes()}


RUNS = {"original": run_original, "quantized": run_quantized}


def open_original(request: Mapping[str, Any], **parts: Any) -> Any:
    """The original's pipeline, in the dtype of the result; ``parts`` are used in place of its own."""
    diffusers = import_diffusers()
    options = {"torch_dtype": getattr(torch, request["dtype"])} if request["dtype"] is not None else {}
    options |= {"variant": request["variant"]} if request["variant"] is not None else {}
    options |= {"trust_remote_code": True} if request["trust"] else {}
    options |= {"device_map": "balanced"} if request["device"].endswith(":all") else {}
    return diffusers.DiffusionPipeline.from_pretrained(request["root"], local_files_only=True, **options, **parts)


def open_quantized(request: Mapping[str, Any]) -> Any:
    """The result, by the code of its card; a model that was quantized alone in the original's pipeline."""
    code = re.sub(r"(?m)^(model|pipe)\.to\(device\)$", "", request["code"])
    if request["device"].endswith(":all"):
        code = re.sub(r"(?m)^(pipe = .*\.from_pretrained\(.*)\)$", r'\1, device_map="balanced")', code)
    opened = library_opening.run_code(code)
    return opened if request["alone"] is None else open_original(request, **{request["alone"]: opened})


def _place(pipe: Any, request: Mapping[str, Any]) -> Any:
    """Put it on the device; what does not fit there is put there model by model, by diffusers' own means."""
    device = request["device"]
    if device == "cpu" or device.endswith(":all"):
        return pipe
    if distributes(device, request["nbytes"]):
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def find_parts(pipe: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """The models that were quantized, by their names in the pipeline."""
    return {name: getattr(pipe, name) for name in request["parts"]}


def _run_and_record(
    pipe: Any, parts: Mapping[str, Any], wishes: Wishes, kept: References, number: int, sample: Sample
) -> tuple[int, dict[str, Any]]:
    """Run the original on a sample, with the first arguments that it takes, and keep what comes of that."""
    data = kept.data()
    calls = list(enumerate(list_arguments(pipe, wishes)))
    failure: Exception | None = None
    for at, arguments in calls if data is None else calls[data["call"] :][:1]:
        try:
            with record_calls(parts, kept.folder / f"calls-{number:04d}"):
                ran = run_pipeline(pipe, arguments, sample, "original")
        except NotFiniteError:
            raise
        except Exception as error:  # whatever a pipeline raises for a size that it does not take
            failure = failure or error
            continue
        _save(kept.folder / f"sample-{number:04d}.safetensors", ran)
        return at, arguments
    if failure is None:
        raise BadInputs(f"nothing is known that {type(pipe).__name__} can be called with")
    size = f" at --size {wishes.size[0]}x{wishes.size[1]}" if wishes.size is not None else ""
    reason = eval_child.root_cause(failure)
    raise BadInputs(f"the original pipeline cannot be called{size}: {reason}", "give another --size") from failure


def _save(path: Path, ran: Ran) -> None:
    tensors = {name: tensor for name, tensor in asdict(ran).items() if tensor is not None}
    draft = path.with_name(f".{path.name}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(draft))
    draft.replace(path)


def _describe(wishes: Wishes, samples: list[Sample], call: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What both pipelines are given."""
    sizes = describe_arguments(arguments)
    prompted = samples[0].prompt is not None
    given = [[asdict(sample) for sample in samples], sizes]
    count = plural(len(wishes.prompts), "prompt") if prompted else "no prompt"
    own = "" if wishes.own_prompts or not prompted else " of aoconvert's own"
    seeds = f"seed {wishes.seed}" if wishes.seeds == 1 else f"seeds {wishes.seed} to {wishes.seed + wishes.seeds - 1}"
    return {
        "call": call,
        "kind": "prompts" if prompted else "inputs",
        "detail": ", ".join(filter(None, [f"{count}{own}", seeds, sizes])),
        "samples": len(samples),
        "shown": [asdict(sample) for sample in samples],
        "sha256": hashlib.sha256(json.dumps(given).encode()).hexdigest(),
    }


def _keep_layers(
    parts: Mapping[str, Any], request: Mapping[str, Any], kept: References, number: int, rows: int
) -> None:
    """Keep rows of the inputs of each part's layers, of one call: each sample has another one."""
    for name, part in parts.items():
        calls = list_calls(kept.folder / f"calls-{number:04d}", name)
        if not calls:
            continue
        with layers.capture_inputs(part, rows) as captured:
            repeat_call(part, read_call(calls[(number + len(calls) // 2) % len(calls)]))
        path = kept.folder / f"layers-{name}-{number:04d}.safetensors"
        save_file(captured.tensors(part), str(path), captured.metadata())


def _keep_noise(
    pipe: Any,
    parts: Mapping[str, Any],
    request: Mapping[str, Any],
    kept: References,
    number: int,
    sample: Sample,
    arguments: Mapping[str, Any],
) -> None:
    """Run the original once more, with noise in the models that were quantized: the sample is done then."""
    figures: dict[str, Any] = {}
    if request["noise"]:
        # what is not finite with noise is not the result's fault
        with contextlib.suppress(NotFiniteError), contextlib.ExitStack() as noisy:
            for part in parts.values():
                noisy.enter_context(noise.rounding_noise(part, request["wishes"]["seed"]))
            calls = _repeat_calls(parts, request, kept, number)
            ran = run_pipeline(pipe, arguments, sample, "original")
            figures = {"calls": calls, **_compare_ran(kept, number, ran, request)}
    write_json(kept.folder / f"sample-{number:04d}.json", figures)


def _repeat_calls(
    parts: Mapping[str, Any], request: Mapping[str, Any], kept: References, number: int
) -> dict[str, list[dict[str, Any]]]:
    """Compare what each part makes of the original's inputs with what the original made of them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, part in parts.items():
        found[name] = []
        for path in list_calls(kept.folder / f"calls-{number:04d}", name):
            call = read_call(path)
            figures = compare_calls(request["parts"][name], call["output"], repeat_call(part, call))
            found[name].append({"call": call["call"], **figures.to_dict()})
    return found


def _compare_ran(kept: References, number: int, ran: Ran, request: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the final latents and the pictures with those that are kept."""
    before = load_file(kept.folder / f"sample-{number:04d}.safetensors")
    found: dict[str, Any] = {}
    if ran.latents is not None and "latents" in before and before["latents"].shape == ran.latents.shape:
        latents = compare_whole(before["latents"], ran.latents)
        found["latents"] = [latents.signal, latents.noise]
    if ran.pictures is not None and "pictures" in before:
        found |= pictures.compare_pictures(before["pictures"], ran.pictures, lpips=request["lpips"])
    return found


class _Peak:
    """The most memory that this process has of its own in the ``with`` block, and on a GPU what torch took there."""

    def __init__(self, device: str) -> None:
        self._gpu = device != "cpu"
        self._most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def nbytes(self) -> int:
        if self._gpu:
            return int(sum(torch.cuda.max_memory_allocated(at) for at in range(torch.cuda.device_count())))
        self._look()
        return self._most

    def _watch(self) -> None:
        while not self._over.wait(_LOOK):
            self._look()

    def _look(self) -> None:
        self._most = max(self._most, anonymous_bytes(os.getpid()))


if __name__ == "__main__":
    main()
