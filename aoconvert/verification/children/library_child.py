"""Runs in a fresh interpreter, without aoconvert: the library opens the source and the result, and both are compared.

Reads one JSON request from stdin:

- ``source``: ``{"folder", "variant", "file"}`` (``file``: a single file in its authors' names, whose configs the folder
  holds, or null); ``loras``: that were added, each ``{"file", "weight", "peft"}``;
- ``result``: ``{"folder", "code"}`` (``code``: the card's way of opening what
  ``from_pretrained`` cannot, or null);
- ``kind``: what ``from_pretrained`` of both gives (``pipeline``, ``diffusers``, ``transformers``);
- ``imports``: modules to import before a file of the result is opened; ``trust``: run code inside the checkpoints;
- ``left``: paths of the source's files and folders that are left behind, as the manifest says;
- ``available``: bytes of memory that may be used; ``scratch``: an empty folder on disk;
- ``parts``: name → what the manifest says of a quantized model: ``library``, ``module`` (where its class is),
  ``class_name``, ``auto_class`` (what opens it where its class is code inside the checkpoint, or null),
  ``source_folder``, ``result_folder``, ``dtype``, ``kwargs``, ``fused``, ``untied``, ``missing`` and ``dropped``
  (names), ``tensors`` (name → ``class_name``, ``sqnr_db`` of each quantized one).

Writes JSON lines: ``{"problem", "part", "other"}`` (``other``: it speaks for another model), ``{"left"}`` (a quantized
tensor whose values nothing here gives back), ``{"skipped"}``, ``{"error"}``; at last ``{"compared", "worst"}``, how
much of what, and the lowest SQNR in dB.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch


def sibling(name: str) -> Any:
    """A module beside this one; an isolated interpreter does not look here."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


opening, tensors, configs = sibling("library_opening"), sibling("library_tensors"), sibling("library_configs")
reports, files, loras = sibling("library_reports"), sibling("library_files"), sibling("library_loras")


class Comparison:
    """What was found; ``counted``: how many of what were equal, ``worst``: the lowest SQNR in dB."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.source = Path(request["source"]["folder"])
        self.result = Path(request["result"]["folder"])
        self.variant = request["source"]["variant"]
        self.single: Any = None
        self.counted: Counter[str] = Counter()
        self.worst: float | None = None
        self.part = ""

    def problem(self, text: str | None, *, other: bool = False) -> None:
        """Say what differs; ``other``: as it does between two models."""
        if text is not None:
            say({"problem": text, "part": self.part, "other": other})

    def problems(self, texts: Any) -> None:
        """Say all that differs."""
        for text in texts:
            self.problem(text)


def main() -> None:
    """Answer the request on stdin."""
    request = json.load(sys.stdin)
    comparison = Comparison(request)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            for name in request["imports"]:
                importlib.import_module(name)
            if (file := request["source"].get("file")) is not None:
                comparison.single = files.SingleFile(file, str(comparison.source), request["available"])
            compare_pipelines(comparison) if request["kind"] == "pipeline" else compare_single(comparison)
            if comparison.single is None:
                compare_files(comparison)
    except (opening.CannotCompare, files.NoMemory, loras.NotAdded) as error:
        say({"skipped": str(error)})
    except Exception as error:
        say({"error": f"{comparison.part}: {root_cause(error)}".lstrip(": ")})
    say({"compared": dict(comparison.counted), "worst": comparison.worst})


def root_cause(error: BaseException) -> str:
    """The first error of the chain, in one line."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def compare_single(comparison: Comparison) -> None:
    """A checkpoint that is one model."""
    [(_, part)] = comparison.request["parts"].items()
    part["trust"] = comparison.request["trust"]
    source, source_report = open_source(comparison, part)
    if comparison.request.get("loras"):
        added = comparison.request["loras"], comparison.request["available"]
        source, part["before"] = loras.add_loras(source, *added)
    code = comparison.request["result"]["code"]
    if code is None:
        result, report = open_result(comparison, part)
    else:
        result, report = opening.run_code(code), None
    compare_models(comparison, part, source, result)
    compare_reports(comparison, part, source_report, report)
    compare_unused(comparison, part, source, source_report)
    if comparison.request["kind"] == "transformers":
        places = comparison.source / part["source_folder"], comparison.result / part["result_folder"]
        comparison.problems(configs.compare_adapters(*places))
        comparison.problems(configs.compare_beside(*places, trust=part["trust"]))


def compare_files(comparison: Comparison) -> None:
    """What is in the folders beside weights and configs."""
    request, source, comparison.part = comparison.request, comparison.source, ""
    chosen = [source / part["source_folder"] for part in request["parts"].values()]
    whole = request["kind"] == "pipeline"
    opened = [path for path in source.iterdir() if path.is_dir()] if whole else chosen
    written = {folder / "config.json" for folder in chosen}
    written |= {path for folder in opened for path in opening.weights_files(folder, comparison.variant)}
    left = {Path(path) for path in request["left"]}
    comparison.problems(configs.compare_files(source if whole else chosen[0], comparison.result, written, left))


def open_source(comparison: Comparison, part: dict[str, Any]) -> tuple[Any, dict[str, list[str]] | None]:
    """The source's model, in the dtype that it is stored in; one that is quantized, dequantized to the result's."""
    if comparison.single is not None:
        part["stored"] = comparison.single.stored
        return comparison.single.open(opening.model_class(part)[0], part["stored"]), None
    folder, variant = part["source_folder"], comparison.variant
    opening.require_memory(part, comparison.source, folder, variant, comparison.request["available"])
    part["quantized"] = opening.quantization_of(comparison.source / folder) is not None
    stored = opening.stored_dtype(comparison.source / folder, variant)
    part["stored"] = getattr(torch, part["dtype"]) if part["quantized"] else stored
    options = opening.dtype_option(part["library"], part["stored"])
    found: tuple[Any, dict[str, list[str]]] = opening.open_model(
        part, comparison.source, folder, **options, **variant_option(variant)
    )
    return found


def open_result(comparison: Comparison, part: dict[str, Any]) -> tuple[Any, dict[str, list[str]]]:
    """The result's model, with what the card gives ``from_pretrained``."""
    kwargs = {key: getattr(torch, value) if key == "torch_dtype" else value for key, value in part["kwargs"].items()}
    found: tuple[Any, dict[str, list[str]]] = opening.open_model(
        part, comparison.result, part["result_folder"], **kwargs
    )
    return found


def variant_option(variant: str | None) -> dict[str, str]:
    """How ``from_pretrained`` is told a variant."""
    return {"variant": variant} if variant else {}


def compare_pipelines(comparison: Comparison) -> None:
    """A pipeline: its parts and their classes, then each part, one model at a time."""
    request, variant, single = comparison.request, comparison.variant, comparison.single
    for part in request["parts"].values() if single is None else ():
        part["trust"] = request["trust"]
        opening.require_memory(part, comparison.source, part["source_folder"], variant, request["available"])
    trust = {"trust_remote_code": True} if request["trust"] else {}
    dtypes = opening.part_dtypes(comparison.source if single is None else comparison.result, variant)
    options = {**trust, **variant_option(variant)}
    source = single.open_pipeline() if single else opening.open_pipeline(comparison.source, dtypes, **options)
    if request.get("loras"):
        source, before = loras.add_loras(source, request["loras"], request["available"])
        for name, part in request["parts"].items():
            part["before"] = {k.removeprefix(f"{name}."): t for k, t in before.items() if k.startswith(f"{name}.")}
    code = request["result"]["code"]
    own = {name: getattr(torch, part["dtype"]) for name, part in request["parts"].items()}
    if code is not None:
        result = opening.run_code(code)
    else:
        bins = any("use_safetensors" in part["kwargs"] for part in request["parts"].values())
        kind = {"use_safetensors": False} if bins else {}
        result = opening.open_pipeline(comparison.result, {**dtypes, **own}, **trust, **kind)
    comparison.problems(configs.compare_pipelines(source, result))
    for name in sorted(source.components.keys() & result.components.keys()):
        comparison.part = name
        compare_part(comparison, name, source.components[name], result.components[name], by_code=code is not None)


def compare_part(comparison: Comparison, name: str, source: Any, result: Any, *, by_code: bool) -> None:
    """One part of a pipeline in both; ``by_code``: the card's code made the result's, in the pipeline's dtype."""
    if not isinstance(source, torch.nn.Module) or not isinstance(result, torch.nn.Module):
        comparison.problems(configs.compare_objects(name, source, result))
        comparison.counted["others"] += source is not None
        return
    part = comparison.request["parts"].get(name)
    if part is None:
        library = "transformers" if hasattr(source, "get_input_embeddings") else "diffusers"
        part = {"library": library, "tensors": {}, "untied": False, "fused": False, "missing": [], "dropped": []}
        part |= {"source_folder": name, "result_folder": name, "dtype": None, "kwargs": {}, "loose": by_code}
    part["trust"] = comparison.request["trust"]
    if comparison.single is not None:
        comparison.single.part = name
        part |= {"stored": comparison.single.stored, "loose": comparison.single.mixed}
        compare_models(comparison, part, source, result)
        return
    part["stored"] = opening.stored_dtype(comparison.source / name, comparison.variant)
    compare_models(comparison, part, source, result)
    # the library gives a report only of a model that is opened by itself
    dtype = opening.dtype_option(part["library"], part["stored"])
    here = reports.report_of(type(source), comparison.source / name, **dtype, **variant_option(comparison.variant))
    kwargs = {key: getattr(torch, value) if key == "torch_dtype" else value for key, value in part["kwargs"].items()}
    there = None if part["fused"] else reports.report_of(type(result), comparison.result / name, **(kwargs or dtype))
    compare_reports(comparison, part, here, there)
    compare_unused(comparison, part, source, here)


def compare_models(comparison: Comparison, part: dict[str, Any], source: Any, result: Any) -> None:
    """Every parameter and buffer, ties, classes, and what the configs of the opened models say."""
    if configs.class_of(source) != configs.class_of(result):
        comparison.problem(f"it is a {configs.class_of(result)}, {configs.class_of(source)} in the source", other=True)
        return
    if part["fused"]:
        source.fuse_qkv_projections()
    stated = {"untied": part["untied"], "dropped": bool(part["dropped"])}
    comparison.problems(configs.compare_model_configs(source, result, **stated))
    comparison.problems(tensors.compare_ties(source, result, untied=part["untied"]))
    part["tensors"] = tensors.with_ties(result, part["tensors"])
    made = Made(comparison, part, source)
    here, there = tensors.tensors_of(source), tensors.tensors_of(result)
    for name in sorted(here.keys() - there.keys()):
        if not (part["fused"] and in_fused(source, name)):
            comparison.problem(f"{name} is in the source's model, but not in the result's", other=True)
    for name in sorted(there.keys() - here.keys()):
        comparison.problem(f"{name} is in the result's model, but not in the source's", other=True)
    held = result.state_dict().keys() if hasattr(result, "state_dict") else there.keys()
    for name in sorted(here.keys() & there.keys()):
        if name in held:
            compare_tensor(comparison, part, name, here[name], there[name], made.types.get(name, here[name]))
        else:
            compare_buffer(comparison, name, here[name], there[name], made)


def in_fused(model: Any, name: str) -> bool:
    """Whether a tensor belongs to a projection that the library fused into another one."""
    owner = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    return bool(getattr(owner, "fused_projections", False))


class Made:
    """The source's model as the library makes it in the result's dtype; empty where the source is stored in that dtype.

    On ``meta`` it has the right dtypes and no values, on disk the values of the buffers that no file holds; neither
    takes memory.
    """

    def __init__(self, comparison: Comparison, part: dict[str, Any], source: Any) -> None:
        self.source = source
        dtype = getattr(torch, part["dtype"]) if part["dtype"] else None
        self.single, self.dtype = comparison.single, dtype
        self.needed = dtype is not None and (dtype != part["stored"] or self.single is not None)
        self.folder = str(comparison.source / part["source_folder"])
        self.scratch = str(Path(comparison.request["scratch"]) / (comparison.part or "model"))
        self.options = {**opening.dtype_option(part["library"], dtype), **variant_option(comparison.variant)}
        self.types: dict[str, torch.Tensor] = part.get("before", {})  # a LoRA made them float32
        self.values: dict[str, torch.Tensor] | None = None
        if self.needed:
            model = self._open("meta")
            if part["fused"]:
                model.fuse_qkv_projections()
            self.types = tensors.tensors_of(model)

    def _open(self, place: str) -> Any:
        if self.single is not None:
            make = self.single.types if place == "meta" else self.single.open
            return make(type(self.source), self.dtype)
        options = {**self.options, "device_map": {"": place}, "offload_folder": self.scratch}
        return type(self.source).from_pretrained(self.folder, local_files_only=True, **options)

    def buffer(self, name: str) -> torch.Tensor | None:
        """A buffer that no file holds."""
        if self.needed and self.values is None:
            self.values = tensors.tensors_of(self._open("disk"))
        return (self.values or {}).get(name)


def compare_tensor(
    comparison: Comparison,
    part: dict[str, Any],
    name: str,
    original: torch.Tensor,
    found: torch.Tensor,
    expected: torch.Tensor,
) -> None:
    """One tensor of the state dict; ``expected`` has the dtype that the library gives the source's."""
    entry = part["tensors"].get(name)
    if tensors.is_quantized(found):
        if entry is None:
            comparison.problem(f"{name} is quantized, but the manifest does not say so")
            return
        compare_quantized(comparison, part, name, original, found, entry)
        return
    if entry is not None:
        comparison.problem(f"{name} is not quantized, but the manifest says that it is")
        return
    wrong = None if part.get("loose") else tensors.compare_dtype(name, expected, found)
    if wrong is None:
        wrong = tensors.compare_values(name, original, found)
    comparison.problem(wrong, other=True)
    comparison.counted["equal"] += wrong is None


def compare_buffer(comparison: Comparison, name: str, original: torch.Tensor, found: torch.Tensor, made: Made) -> None:
    """A buffer that no file holds; where it is not the source's, as the library makes it in the result's dtype."""
    wrong = tensors.compare_buffers(name, original, found)
    if wrong is not None and (other := made.buffer(name)) is not None:
        wrong = tensors.compare_buffers(name, other, found)
    comparison.problem(wrong, other=True)
    comparison.counted["buffers"] += wrong is None


def compare_quantized(
    comparison: Comparison,
    part: dict[str, Any],
    name: str,
    original: torch.Tensor,
    found: torch.Tensor,
    entry: dict[str, Any],
) -> None:
    """A quantized tensor against the source's values and the manifest's figure.

    A tensor that the library makes out of others is cast first, as the library does it.
    """
    try:
        sqnr, wrong = tensors.compare_quantized(name, original, found, entry)
        if wrong is not None and part["dtype"] and name not in held_by(comparison, part):
            sqnr, wrong = tensors.compare_quantized(name, original.to(getattr(torch, part["dtype"])), found, entry)
    except NotImplementedError:
        say({"left": name, "part": comparison.part})
        return
    comparison.problem(wrong, other=True)
    comparison.counted["quantized"] += wrong is None
    if sqnr is not None and sqnr != float("inf"):
        comparison.worst = sqnr if comparison.worst is None else min(sqnr, comparison.worst)


def held_by(comparison: Comparison, part: dict[str, Any]) -> dict[str, Path]:
    """Name of each tensor in the source's files → the file; of a single file, none has the library's name."""
    if comparison.single is not None:
        return {}
    found: dict[str, Path] = opening.stored_names(comparison.source / part["source_folder"], comparison.variant)
    return found


def compare_reports(comparison: Comparison, part: dict[str, Any], source: Any, result: Any) -> None:
    """The library's loading reports."""
    for text, other in reports.compare_reports(part, source, result):
        comparison.problem(text, other=other)


def compare_unused(comparison: Comparison, part: dict[str, Any], model: Any, report: Any) -> None:
    """Tensors in the files that the class does not use: the same in both, bit by bit."""
    here = held_by(comparison, part)
    folder = comparison.source / part["source_folder"]
    codes = opening.quantized_modules(folder, comparison.variant) if part.get("quantized") else set()
    there = opening.stored_names(comparison.result / part["result_folder"], None)
    known = tensors.tensors_of(model).keys()
    reported = set(report["unexpected_keys"]) if report is not None else set()
    unused = (reported & here.keys()) | reports.find_ignored(model, here.keys() - known)
    for name, file in sorted(here.items()):
        if name not in unused or name in part["dropped"]:
            continue
        if name.rpartition(".")[0] in codes:
            continue  # the library does not dequantize what its class does not use
        if name not in there:
            comparison.problem(
                f"{name}, which the class does not use, is in the source's files, but not in the result's"
            )
        else:
            wrong = tensors.compare_values(name, opening.read(name, file), opening.read(name, there[name]))
            comparison.problem(wrong)
            comparison.counted["unused"] += wrong is None


def say(value: dict[str, Any]) -> None:
    """One line of the answer, also while what the libraries print is kept off it."""
    sys.__stdout__.write(json.dumps(value) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
