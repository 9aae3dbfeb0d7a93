"""One forward pass of a model that was opened, on an input that is found for it, and of its original."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch


def attempt_forward(
    model: Any, original: dict[str, Any] | None = None, folder: str | None = None, handed: Any = None
) -> dict[str, Any]:
    """One small forward pass: ``{"status", "detail", "output_sqnr_db", "inputs"}``.

    Args:
        model: what was opened.
        original: how to open what it was made of.
        folder: of the model; what prepares its inputs may lie there or beside it.
        handed: what its pipeline hands to it, see :func:`hand_out`.
    """
    package, name = load_inputs(), type(model).__name__
    try:
        places = package.processor_folders(Path(folder)) if folder is not None else ()
        own = [handed] if handed is not None else []
        found = package.find_inputs(model, [*own, *package.from_libraries(model, places)])
    except package.NoInputs as error:
        return answer("skipped", f"no input that the unquantized {name} accepts: {error}")
    except Exception as error:
        return answer("skipped", f"no input for {name}: {root_cause(error)}")
    return run_forward(model, found, package, original)


def hand_out(whole: Any, models: dict[str, Any]) -> dict[str, Any]:
    """What a pipeline hands to its parts, by their names; nothing for a model alone, or where its call fails."""
    if not hasattr(whole, "components"):
        return {}
    try:
        return dict(load_inputs().from_pipeline(whole, models))
    except Exception:  # whatever a pipeline is made of
        return {}


def answer(status: str, detail: str, sqnr: float | None = None, inputs: str | None = None) -> dict[str, Any]:
    """What a forward pass gave, and who made its inputs."""
    return {"status": status, "detail": detail, "output_sqnr_db": sqnr, "inputs": inputs}


def run_forward(model: Any, found: Any, package: Any, original: dict[str, Any] | None = None) -> dict[str, Any]:
    """A pass with arguments that were found for the class, of the model and of the original.

    What a model of the class that is not quantized does not take either is no failure of this one.
    """
    name = type(model).__name__
    values, error = one_pass(model, found, package)
    before = run_original(original, found, package) if original is not None else "no source given"
    judged = before if isinstance(before, tuple) else None  # what the original gave, and what it raised
    if error is not None:
        failure = f"the forward pass of {name} failed: {root_cause(error)}"
        if judged is not None and judged[1] is not None:
            return answer("skipped", f"{failure}; the original's fails too: {root_cause(judged[1])}")
        if found.proof == "nothing" or (found.proof == "shapes" and isinstance(error, IndexError)):
            return answer("skipped", f"{failure}; there is not enough memory to try the input on the original")
        return answer("failed", failure)
    if not all_finite(values):
        if judged is not None and not all_finite(judged[0]):
            return answer("skipped", f"the output of {name} is not finite, and the original's is not either")
        if judged is None and found.finite is False:
            return answer("skipped", f"the output of {name} is not finite, quantized or not")
        return answer("failed", f"the output of {name} is not finite")
    shape = f"output {list(values[0].shape)}, finite" if values else "a forward pass"
    compared, sqnr = compare_outputs(before, values, package)
    return answer("passed", f"{name}: {shape}{compared}", sqnr, found.source)


def one_pass(model: Any, found: Any, package: Any) -> tuple[list[torch.Tensor], Exception | None]:
    """The floating-point tensors that a model gives, on the CPU, or what it raises."""
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            output = model(**on_device(found.make(), model.device))
    except Exception as error:
        return [], error
    return [tensor.cpu() for tensor in package.first_tensors(output)], None


def all_finite(values: list[torch.Tensor]) -> bool:
    """Whether there is no NaN and no infinity."""
    return all(bool(tensor.isfinite().all()) for tensor in values)


def run_original(how: dict[str, Any], found: Any, package: Any) -> tuple[list[torch.Tensor], Exception | None] | str:
    """What the original gives for the same input, or why nobody knows."""
    opening = sibling("library_opening")
    folder, dtype = Path(how["folder"]), getattr(torch, how["dtype"])
    try:
        files = opening.weights_files(folder, how["variant"])
        count = sum(size // kind.itemsize for file in files for _, kind, size in opening.list_stored(file))
        needed, there = count * dtype.itemsize, package.available_memory()
        if needed > there:
            return f"the original needs {needed / 1e9:.1f} GB of memory, {there / 1e9:.1f} GB are available"
        options = opening.dtype_option(how["library"], dtype)
        options |= {"variant": how["variant"]} if how["variant"] is not None else {}
        original, _ = opening.open_model(how, folder, "", **options)
    except Exception as error:
        return f"the library cannot open the original: {root_cause(error)}"
    return one_pass(original.eval(), found, package)


def compare_outputs(before: Any, values: list[torch.Tensor], package: Any) -> tuple[str, float | None]:
    """What there is to say of the original's output beside the result's, and the SQNR in dB where it is finite."""
    if isinstance(before, str):
        return ("" if before == "no source given" else f"; not compared: {before}"), None
    outputs, error = before
    if error is not None:
        return f"; the original's forward pass fails: {root_cause(error)}", None
    sqnr = package.sqnr_db(outputs, values)
    if sqnr is None:
        return "; its output cannot be compared with the original's", None
    if sqnr == float("inf"):
        return ", equal to the original's", None
    return f", {sqnr:.1f} dB SQNR to the original's", round(sqnr, 3)


def sibling(name: str) -> Any:
    """A module beside this one; an isolated interpreter does not look here."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_inputs() -> Any:
    """The package ``inputs``, by its path: nothing else of aoconvert is to be imported here."""
    if "inputs" in sys.modules:
        return sys.modules["inputs"]
    folder = Path(__file__).resolve().parents[2] / "inputs"
    spec = importlib.util.spec_from_file_location("inputs", folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["inputs"] = package
    spec.loader.exec_module(package)
    return package


def on_device(value: Any, device: Any) -> Any:
    """The inputs on the model's device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: on_device(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_device(item, device) for item in value)
    return value


def root_cause(error: BaseException) -> str:
    """The first error of the chain: diffusers hides an UnpicklingError behind an OSError."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
