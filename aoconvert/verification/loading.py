"""The checks that load: in fresh interpreters, never before the pickles were found safe."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aoconvert.errors import VerificationError
from aoconvert.manifest import UnquantizedEntry
from aoconvert.verification.pickles import read_bin
from aoconvert.verification.process import ask
from aoconvert.verification.published import Published
from aoconvert.verification.report import Status, some
from aoconvert.verification.target import Part, Target


@dataclass
class Loaded:
    """What the fresh interpreters said: of each part's tensors, by name, of its forward pass, and of the example."""

    tensors: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    forward: list[dict[str, Any]] = field(default_factory=list)

    @property
    def example(self) -> bool:
        """Whether the card's example ran."""
        return any(answer.get("example") and answer["forward"]["status"] == "passed" for answer in self.forward)

    @property
    def forward_passed(self) -> bool:
        """Whether every model alone took a forward pass."""
        passes = [answer["forward"]["status"] for answer in self.forward if not answer.get("example")]
        return bool(passes) and set(passes) == {"passed"}


def check_load(target: Target, loaded: Loaded) -> tuple[Status, str]:
    """``torch.load(weights_only=True, mmap=True)`` of every quantized file, and what came out against the manifest."""
    problems: list[str] = []
    count = 0
    try:
        # parts that are not quantized go with the first: an interpreter takes seconds to start
        others = target.manifest.unquantized if target.manifest is not None else []
        for part in target.parts:
            found = _load(target, part, [file.path for entry in others for file in entry.files])
            tensors = loaded.tensors[part.name] = _of(found, part.files)
            problems += _differences(part, tensors)
            for entry in others:
                problems += _stored_differences(entry, _of(found, [file.path for file in entry.files]))
            count += sum(map(len, found.values()))
            others = []
    except VerificationError as error:
        return "failed", error.message
    if problems:
        return "failed", some(problems)
    compared = "" if target.manifest else " (no manifest to compare with)"
    return "passed", f"{count} tensors, weights_only=True, mmap=True{compared}"


def _load(target: Target, part: Part, more: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """What a fresh interpreter says of each tensor of a part's ``.bin`` files and of ``more``, by file and name.

    Raises:
        VerificationError: torch does not load them.
    """
    root = target.folder.resolve()
    answers = ask(
        "load_child",
        {
            "files": [str(root / file) for file in (*part.files, *more) if file.endswith(".bin")],
            "imports": list(target.imports),
            "safe_globals": list(part.safe_globals) if part.safe_globals is not None else None,
        },
    )
    if "error" in answers[-1]:
        raise VerificationError(f"{part.name or part.class_name}: {answers[-1]['error']}")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for answer in answers:
        if "name" in answer:
            found.setdefault(Path(answer["file"]).relative_to(root).as_posix(), {})[answer["name"]] = answer
    return found


def _of(found: dict[str, dict[str, dict[str, Any]]], files: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {name: tensor for file in files for name, tensor in found.get(file, {}).items()}


def _differences(part: Part, tensors: dict[str, dict[str, Any]]) -> list[str]:
    if part.tensors is None:
        return []
    return _against_manifest(
        {
            name: {
                "class": entry.class_name,
                "shape": entry.shape,
                "dtype": entry.dtype,
                "data_names": entry.data_names,
                "sha256": entry.sha256,
            }
            for name, entry in part.tensors.items()
            if entry.action != "tied"
        },
        tensors,
    )


def _stored_differences(entry: UnquantizedEntry, tensors: dict[str, dict[str, Any]]) -> list[str]:
    wanted = {
        tensor.name: {
            "class": "torch.Tensor",
            "shape": tensor.shape,
            "dtype": tensor.dtype,
            "data_names": [],
            "sha256": tensor.sha256,
        }
        for tensor in entry.tensors
    }
    return [f"{entry.name}: {line}" for line in _against_manifest(wanted, tensors)]


def _against_manifest(wanted: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the tensors that were found, one line each."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not in the manifest" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        for key, value in wanted[name].items():
            if found[name][key] != value:
                problems.append(f"{name}: its {key} is {found[name][key]}, the manifest says {value}")
                break
    return problems


def check_published(
    target: Target, published: Published, code: str, loaded: Loaded, *, forward: bool, example: str | None
) -> tuple[Status, str]:
    """:func:`check_reload` with code that opens a commit on the Hub, in a process whose cache is empty."""
    request = _request(target, code, forward=forward, example=example)
    with published.empty_cache() as home:
        environment = published.environment(os.environ, home)
        status, detail = _reloaded(request, lambda: ask("reload_child", request, environment=environment), loaded)
        others = published.other_files(home)
    also = f", and fetched {some(others)}" if others else ""
    return status, f"from the Hub ({published.shown}) with an empty cache: {detail}{also}"


def check_reload(
    target: Target, code: str, loaded: Loaded, *, forward: bool, example: str | None
) -> tuple[Status, str]:
    """Open the checkpoint with ``code`` in a fresh interpreter; every quantized tensor must be what was written.

    ``forward`` and ``example`` (code that uses what was opened) run there too; ``check_forward`` says what they gave.
    """
    request = _request(target, code, forward=forward, example=example)
    return _reloaded(request, lambda: ask("reload_child", request), loaded)


def _request(target: Target, code: str, *, forward: bool, example: str | None) -> dict[str, Any]:
    parts = {part.name: _expected(target, part) for part in target.parts}
    return {"code": code, "parts": parts, "forward": forward, "example": example}


def _reloaded(
    request: dict[str, Any], open_it: Callable[[], list[dict[str, Any]]], loaded: Loaded
) -> tuple[Status, str]:
    """Whether what was opened is what was written."""
    try:
        answers = open_it()
    except VerificationError as error:
        return "failed", error.message
    if "error" in answers[0]:
        return "failed", str(answers[0]["error"])
    problems = [f"{answer['part']}: {line}".lstrip(": ") for answer in answers for line in answer.get("problems", ())]
    if problems:
        return "failed", some(problems)
    loaded.forward = [answer for answer in answers if "forward" in answer]
    count = sum(len(names) for names in request["parts"].values())
    return "passed", f"{answers[0]['loaded']}, {count} quantized tensors in place"


def _expected(target: Target, part: Part) -> dict[str, list[str | None]]:
    """Quantized tensor → its class and content hash."""
    if part.tensors is not None:
        return {t.name: [t.class_name, t.sha256] for t in part.tensors.values() if t.action == "quantize"}
    found: dict[str, list[str | None]] = {}
    for file in part.files:
        for name, tensor in read_bin(target.folder / file).tensors.items():
            if tensor.inner:
                found[name] = [tensor.class_name, None]
    return found


def check_numbers(target: Target, loaded: Loaded, source: str | None) -> tuple[Status, str]:
    """NaN, infinity and zero scales; with a source, every weight's error against the manifest's figure."""
    tensors = [item for part in loaded.tensors.values() for item in part.items()]
    problems = [f"{name}: {line}" for name, tensor in tensors for line in tensor["problems"]]
    if problems:
        return "failed", some(problems)
    if source is None:
        return "passed", "no NaN, no infinity, no zero scale (--source compares with the original)"
    from aoconvert.verification.numbers import compare_with_source

    worst, count, problems = compare_with_source(target, source)
    if problems:
        return "failed", some(problems)
    shown = f", worst SQNR {worst:.1f} dB" if math.isfinite(worst) else ""
    return "passed", f"{count} tensors compared with the source{shown}"


def check_forward(loaded: Loaded, *, asked: bool, obstacle: str | None = None) -> tuple[Status, str]:
    """What the forward passes of the reloaded models gave; ``obstacle``: why there were none."""
    if not asked:
        return "skipped", "not asked for"
    if obstacle is not None:
        return "skipped", obstacle
    if not loaded.forward:
        return "skipped", "nothing was reloaded"
    # an example that could not be tried does not take back a forward pass that went well
    passes = [answer["forward"] for answer in loaded.forward if not answer.get("example")]
    results = [answer["forward"] for answer in loaded.forward]
    statuses: tuple[tuple[Status, list[dict[str, str]]], ...] = (("failed", results), ("skipped", passes or results))
    for status, among in statuses:
        for result in among:
            if result["status"] == status:
                return status, str(result["detail"])
    return "passed", "; ".join(str(result["detail"]) for result in results)
