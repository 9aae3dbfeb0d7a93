"""Runs in a fresh interpreter: opens one model by its library and runs it on the samples, one after the other.

Reads one JSON request from stdin. ``role`` is ``original`` (makes the samples where they are not there, keeps what the
model gives in ``folder``, see ``aoconvert.evaluation.references``) or ``quantized`` (compares what the model gives with
what is kept). Writes JSON lines: ``{"data": …}``, ``{"sample": N, "figures": {…}}``, ``{"layer": {…}}``,
``{"done": true}``; or ``{"error": …, "hint": …, "kind": "original|quantized|data|memory"}``.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # an isolated interpreter does not look here
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from aoconvert.environment import quiet_imports

with quiet_imports():
    import torchao.quantization  # noqa: F401

from safetensors import safe_open
from safetensors.torch import save_file

from aoconvert.evaluation.children import layers, noise, samples, sensitivity
from aoconvert.evaluation.children.opening import open_original, open_quantized
from aoconvert.evaluation.children.passes import Outcome, compare, run_sample
from aoconvert.evaluation.figures import NotFiniteError
from aoconvert.evaluation.references import References, write_json
from aoconvert.verification.children.library_opening import CannotCompare
from aoconvert.verification.children.reload_child import say


def main() -> None:
    """Answer the request on stdin; what the model's own code prints is kept off the answers."""
    request = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        answer(request, say)


Run = Callable[[dict[str, Any]], Iterator[dict[str, Any]]]
"""What a program does in a role: gives its lines."""


def answer(
    request: dict[str, Any], say: Callable[[dict[str, Any]], None], runs: Mapping[str, Run] | None = None
) -> None:
    """Run the model, and say what is wrong where that cannot be.

    Args:
        request: from stdin.
        say: is given each line.
        runs: what is done in each role; default: what this program does.
    """
    role = request["role"]
    try:
        for line in (runs or {"original": run_original, "quantized": run_quantized})[role](request):
            say(line)
    except samples.BadInputs as error:
        say({"error": str(error), "hint": error.hint, "kind": "data"})
    except NotFiniteError as error:
        say({"error": str(error), "hint": None, "kind": error.whose})
    except CannotCompare as error:
        say({"error": str(error), "hint": None, "kind": "memory"})
    except Exception as error:
        say({"error": f"the {role} model cannot be run: {root_cause(error)}", "hint": None, "kind": role})
    else:
        say({"done": True})


def run_original(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Make the samples, and keep what the original gives for those that are not done."""
    kept = References(Path(request["folder"]))
    model, dtype = open_original(request["how"], request["device"])
    if kept.data() is None:
        made = samples.make_samples(model, samples.Wishes(**request["wishes"]))
        facts = {
            "kind": made.kind,
            "detail": made.detail,
            "samples": len(made.samples),
            "sha256": samples.digest(made.samples),
            "dtype": dtype,
            "takes": sorted(made.samples[0]),
        }
        samples.save_samples(kept.folder, made, facts)
    inputs = samples.load_samples(kept.folder)
    yield {"data": kept.data()}
    if kept.sensitivity() is None:
        keep_sensitivity(model, request, kept, inputs[0])
    for number, sample in enumerate(inputs):
        if kept.noise_floor(number) is None:
            keep_sample(model, request, kept, number, sample, -(-request["rows"] // len(inputs)))
        yield {"sample": number}


def keep_sample(
    model: Any, request: dict[str, Any], kept: References, number: int, sample: dict[str, Any], rows: int
) -> None:
    """Run the original on a sample, once as it is and once with noise, and keep what it gives."""
    task = request["task"]
    with layers.capture_inputs(model, rows) as captured:
        before = run_sample(model, task, sample)
    compare(task, before, before.output)  # NaN is said before anything is kept
    with torch.no_grad():
        kept_rows = captured.tensors(model)
    tensors = {"output": before.output.contiguous(), **kept_rows}
    if before.targets is not None:
        tensors["targets"] = before.targets.contiguous()
    draft = kept.folder / f".sample-{number:04d}.safetensors"
    save_file(tensors, str(draft), captured.metadata())
    draft.replace(kept.folder / f"sample-{number:04d}.safetensors")
    del tensors, captured, kept_rows
    figures: dict[str, Any] = {}
    if request["noise"]:
        # what is not finite with noise is not the result's fault
        with contextlib.suppress(NotFiniteError), noise.rounding_noise(model, request["wishes"]["seed"]):
            figures = compare(task, before, run_sample(model, task, sample).output).to_dict()
    write_json(kept.folder / f"sample-{number:04d}.json", figures)


def keep_sensitivity(model: Any, request: dict[str, Any], kept: References, sample: dict[str, Any]) -> None:
    """Keep what an error in each weight would do, or why that is not known."""
    try:
        found: dict[str, Any] = {
            "layers": sensitivity.measure_sensitivity(model, request["task"], sample, request["wishes"]["seed"])
        }
    except Exception as error:  # whatever a model raises that has no backward pass
        found = {"reason": root_cause(error)}
    kept.keep_sensitivity(found)


def run_quantized(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Compare what the quantized model gives with what is kept of the original."""
    kept = References(Path(request["folder"]))
    inputs = samples.load_samples(kept.folder)
    model = open_quantized(request["code"], request["device"], request["nbytes"])
    for number in request["samples"]:
        with safe_open(str(kept.folder / f"sample-{number:04d}.safetensors"), framework="pt") as file:
            targets = file.get_tensor("targets") if "targets" in file.keys() else None  # noqa: SIM118
            before = Outcome(file.get_tensor("output"), targets)
            after = run_sample(model, request["task"], inputs[number]).output
            if after.shape != before.output.shape:
                shapes = f"{list(before.output.shape)}, the quantized one {list(after.shape)}"
                raise ValueError(f"the original gives {shapes}: they are different models")
            yield {"sample": number, "figures": compare(request["task"], before, after).to_dict()}
    if request["layers"]:
        files = [kept.folder / f"sample-{number:04d}.safetensors" for number in range(len(inputs))]
        for line in layers.measure_layers(model, files, request["layers"]):
            yield {"layer": line}


def root_cause(error: BaseException) -> str:
    """The first error of the chain, in one line: the libraries hide it behind others."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


if __name__ == "__main__":
    main()
