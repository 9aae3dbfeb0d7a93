"""The checks that load: in fresh interpreters, never before the pickles were found safe."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aoconvert.checkpoint.checkpoint import Checkpoint, Part
from aoconvert.checkpoint.manifest import StoredEntry, TensorEntry, UnquantizedEntry
from aoconvert.checkpoint.published import Published
from aoconvert.checkpoint.report import ForwardPass, Status, some
from aoconvert.errors import VerificationError
from aoconvert.formats.registry import TORCH_BIN, read_stored, written_as
from aoconvert.humanize import plural
from aoconvert.sources import Source
from aoconvert.verification.original import find_loras
from aoconvert.verification.process import Children, Ended


@dataclass
class Loaded:
    """What the fresh interpreters said: of each part's tensors, by name, of its forward pass, and of the example.

    ``wait``: for the tensors, which another thread may be about to name.
    """

    tensors: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    forward: list[dict[str, Any]] = field(default_factory=list)
    wait: Callable[[], object] = lambda: None

    @property
    def example(self) -> bool:
        """Whether the card's example ran."""
        return any(answer.get("example") and answer["forward"]["status"] == "passed" for answer in self.forward)

    @property
    def forward_passed(self) -> bool:
        """Whether every model alone took a forward pass."""
        passes = [answer["forward"]["status"] for answer in self.forward if not answer.get("example")]
        return bool(passes) and set(passes) == {"passed"}

    def passes(self, target: Checkpoint) -> tuple[ForwardPass, ...]:
        """The forward pass of each part."""
        classes = {part.name: part.class_name for part in target.parts}
        return tuple(
            ForwardPass.model_validate(
                {
                    "component": answer["part"],
                    "class_name": classes[answer["part"]],
                    "inputs": None,
                    **answer["forward"],
                }
            )
            for answer in self.forward
            if not answer.get("example")
        )


class OtherWeights(VerificationError):
    """A checkpoint opens, and what was opened is not what its files hold."""


def check_load(target: Checkpoint, loaded: Loaded, children: Children) -> tuple[Status, str]:
    """The library's own reader of each weights file, and what came out of it, against the manifest."""
    problems: list[str] = []
    count = 0
    try:
        # parts that are not quantized go with the first: an interpreter takes seconds to start
        others = target.manifest.unquantized if target.manifest is not None else []
        for part in target.parts:
            found = _load(target, part, [file.path for entry in others for file in entry.files], children)
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
    how = "weights_only=True, mmap=True" if any(map(TORCH_BIN.writes, target.files)) else "torchao's reader"
    return "passed", f"{plural(count, 'tensor')}, {how}{compared}"


def _load(
    target: Checkpoint, part: Part, more: Sequence[str], children: Children
) -> dict[str, dict[str, dict[str, Any]]]:
    """What a fresh interpreter says of each tensor of a part's weights files and of ``more``, by file and name.

    Raises:
        VerificationError: torch does not load them.
    """
    root = target.folder.resolve()
    answers = children.ask(
        "load_child",
        {
            "files": [str(root / file) for file in (*part.files, *more) if written_as(file)],
            "imports": list(target.imports),
            "safe_globals": list(part.safe_globals) if part.safe_globals is not None else None,
        },
        nbytes=target.nbytes,
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
    written = {name: entry for name, entry in part.tensors.items() if entry.action != "tied"}
    return _against_manifest(written, tensors)


def _stored_differences(entry: UnquantizedEntry, tensors: dict[str, dict[str, Any]]) -> list[str]:
    lines = _against_manifest({tensor.name: tensor for tensor in entry.tensors}, tensors)
    return [f"{entry.name}: {line}" for line in lines]


def _facts(entry: TensorEntry | StoredEntry) -> dict[str, Any]:
    """What the child says of a tensor, as the manifest has it."""
    return {
        "class": entry.class_name if isinstance(entry, TensorEntry) else "torch.Tensor",
        "shape": list(entry.shape),
        "dtype": entry.dtype,
        "data_names": list(entry.data_names) if isinstance(entry, TensorEntry) else [],
        "sha256": entry.sha256,
    }


def _against_manifest(
    wanted: Mapping[str, TensorEntry] | Mapping[str, StoredEntry], found: dict[str, dict[str, Any]]
) -> list[str]:
    """What is wrong with the tensors that were found, one line each."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not in the manifest" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        for key, value in _facts(wanted[name]).items():
            if found[name][key] != value:
                problems.append(f"{name}: its {key} is {found[name][key]}, but the manifest says {value}")
                break
    return problems


def check_published(
    target: Checkpoint,
    published: Published,
    code: str,
    loaded: Loaded,
    children: Children,
    *,
    forward: bool,
    example: str | None,
    originals: Mapping[str, Any],
) -> tuple[Status, str]:
    """:func:`check_reload` with code that opens a commit on the Hub, in a process whose cache is empty."""
    request = _request(target, code, originals, forward=forward, example=example)
    with published.empty_cache() as home:
        environment = published.environment(os.environ, home)
        size = published.size
        status, detail = _compare_reloaded(
            target, lambda: _reopen(children, request, nbytes=size, fetched=size, environment=environment), loaded
        )
        others = published.other_files(home)
    also = f", and fetched {some(others)}" if others else ""
    return status, f"from the Hub ({published.shown}) with an empty cache: {detail}{also}"


def check_reload(
    target: Checkpoint,
    code: str,
    loaded: Loaded,
    children: Children,
    *,
    forward: bool,
    example: str | None,
    originals: Mapping[str, Any],
) -> tuple[Status, str]:
    """Open the checkpoint with ``code`` in a fresh interpreter; what was opened must be what the files hold.

    ``forward`` and ``example`` (code that uses what was opened) run there too; ``check_forward`` says what they gave.
    ``originals`` says how to open what the parts were made of, for the same forward pass.

    Raises:
        OtherWeights: it opens, and other tensors, from other files, or made anew by the library, are in the model.
    """
    request = _request(target, code, originals, forward=forward, example=example)
    return _compare_reloaded(target, lambda: _reopen(children, request, nbytes=target.nbytes), loaded)


def _request(
    target: Checkpoint, code: str, originals: Mapping[str, Any], *, forward: bool, example: str | None
) -> dict[str, Any]:
    folder = target.folder.resolve()
    by_library = "load_state_dict(" not in code  # that is strict, and has no report
    return {
        "code": code,
        "folder": str(folder),
        "parts": {part.name: _list_expected(target, part) for part in target.parts},
        "reports": {
            part.name: {"folder": str(folder / part.folder), "kwargs": dict(part.kwargs)}
            for part in target.parts
            if by_library
        },
        "places": {part.name: str(folder / part.folder) for part in target.parts},
        "forward": forward,
        "originals": dict(originals),
        "example": example,
    }


def _reopen(children: Children, request: dict[str, Any], **limits: Any) -> list[dict[str, Any]]:
    """What an interpreter says that opens the checkpoint; what it did not come to the end of has a status, too.

    Raises:
        VerificationError: it did not come as far as the forward pass.
    """
    try:
        return children.ask("reload_child", request, **limits)
    except Ended as error:
        opened = [answer for answer in error.answers if "tensors" in answer or "report" in answer]
        if len(opened) < len(request["parts"]) + len(request["reports"]):
            raise
        return [*error.answers, *_answer_for_unfinished(request, error)]


def _answer_for_unfinished(request: dict[str, Any], error: Ended) -> Iterator[dict[str, Any]]:
    """The forward passes and the example that an interpreter was ended in, and those that would have come after.

    A machine with too little memory says nothing of the checkpoint.
    """
    given = {
        "status": "skipped" if error.of == "memory" else "failed",
        "detail": f"the check did not finish: {error.message}",
    }
    done = {answer.get("part") for answer in error.answers if "forward" in answer}
    for name in request["parts"]:
        if request["forward"] and name not in done:
            yield {"part": name, "forward": {**given, "output_sqnr_db": None}}
    if request["example"] is not None:
        yield {"example": True, "forward": given}


def _compare_reloaded(
    target: Checkpoint, open_it: Callable[[], list[dict[str, Any]]], loaded: Loaded
) -> tuple[Status, str]:
    """Whether what was opened is what was written."""
    try:
        first, *answers = open_it()
    except VerificationError as error:
        return "failed", error.message
    if "error" in first:
        return "failed", str(first["error"])
    loaded.wait()
    lines = [(answer["part"], line) for answer in answers for line in answer.get("problems", ())]
    for part in target.parts:
        own = [answer for answer in answers if answer.get("part") == part.name]
        lines += [(part.name, line) for line in (*_find_changed(part, own, loaded), *_made_anew(target, part, own))]
    problems = [f"{part}: {line}".removeprefix(": ") for part, line in lines] + _foreign(target, first["opened"])
    if problems:
        raise OtherWeights(some(problems))
    loaded.forward = [answer for answer in answers if "forward" in answer]
    count = sum(len(_list_expected(target, part)) for part in target.parts)
    return "passed", f"{first['loaded']}, {count} quantized tensors in place"


def _find_changed(part: Part, answers: list[dict[str, Any]], loaded: Loaded) -> list[str]:
    """Tensors that are not what the part's files hold under their names; a cast one cannot be compared."""
    held = loaded.tensors.get(part.name, {})
    found = {name: tensor for answer in answers for name, tensor in answer.get("tensors", {}).items()}
    return [
        f"{name} is not the tensor in {', '.join(part.files)}"
        for name, (dtype, sha256) in found.items()
        if name in held and held[name]["dtype"] == dtype and held[name]["sha256"] != sha256
    ]


def _made_anew(target: Checkpoint, part: Part, answers: list[dict[str, Any]]) -> list[str]:
    """What the library itself reports as missing; the manifest may leave a tensor to the library."""
    allowed = left_to_library(target, part)
    reports = [answer["report"] for answer in answers if "report" in answer]
    problems = [
        f"{name} is in no file: the library initializes it"
        for report in reports
        for name in report["missing_keys"]
        if name not in allowed
    ]
    return problems + [
        f"the library reports {name} as mismatched" for report in reports for name in report["mismatched_keys"]
    ]


def left_to_library(target: Checkpoint, part: Part) -> frozenset[str]:
    """Tensors that the manifest leaves to the library, which makes them anew as it does for the source."""
    entries = target.manifest.components if target.manifest is not None else []
    return frozenset(item.name for entry in entries if entry.path == part.folder for item in entry.missing)


def _foreign(target: Checkpoint, opened: list[str]) -> list[str]:
    """Files of weights that the library opened although they are not those of the checkpoint."""
    own = {path for part in target.parts for path in part.files}
    folders = {part.folder for part in target.parts}
    listed = {file.path for file in target.manifest.files()} if target.manifest is not None else set(opened)
    return [
        f"the library also opened {path}, which is not among the weights"
        for path in opened
        if path not in own and (path not in listed or path.rpartition("/")[0] in folders)
    ]


def _list_expected(target: Checkpoint, part: Part) -> dict[str, list[str | None]]:
    """Quantized tensor → its class and content hash."""
    if part.tensors is not None:
        return {t.name: [t.class_name, t.sha256] for t in part.tensors.values() if t.action == "quantize"}
    found: dict[str, list[str | None]] = {}
    for file in part.files:
        for name, tensor in read_stored(target.folder / file).tensors.items():
            if tensor.inner:
                found[name] = [tensor.class_name, None]
    return found


def check_numbers(
    target: Checkpoint,
    loaded: Loaded,
    source: Source | None,
    left: Mapping[str, frozenset[str]] | None,
    loras: Sequence[str] = (),
) -> tuple[Status, str]:
    """NaN, infinity and zero scales; with a source, weights whose values the library cannot give back here.

    Args:
        target: the checkpoint.
        loaded: what came out of its files.
        source: the original.
        left: part → quantized tensors that the check ``library`` left; ``None`` where it compared nothing.
        loras: files of those that were added.
    """
    tensors = [item for part in loaded.tensors.values() for item in part.items()]
    problems = [f"{name}: {line}" for name, tensor in tensors for line in tensor["problems"]]
    if problems:
        return "failed", some(problems)
    plain = "no NaN, no infinity, no zero scale"
    if source is None:
        return "passed", f"{plain} (--source also compares with the original)"
    if left is not None and not any(left.values()):
        return "passed", plain
    from aoconvert.verification.numbers import compare_with_source

    added = find_loras(target.manifest.source, loras) if target.manifest is not None else []
    if added is None:
        return "passed", f"{plain}; not compared with the source: --lora FILE names the LoRA that was added"
    worst, count, problems = compare_with_source(target, source, left, added)
    if problems:
        return "failed", some(problems)
    shown = f", worst SQNR {worst:.1f} dB" if math.isfinite(worst) else ""
    return (
        "passed",
        f"{plain}; {plural(count, 'tensor')} compared with what aoconvert itself reads from the source{shown}",
    )


def check_forward(loaded: Loaded, *, asked: bool, obstacle: str | None = None) -> tuple[Status, str]:
    """What the forward passes of the reloaded models gave; ``obstacle``: why there were none."""
    if not asked:
        return "skipped", "it was not requested"
    if obstacle is not None:
        return "skipped", obstacle
    if not loaded.forward:
        return "skipped", "the model was not opened"
    # an example that could not be tried does not take back a forward pass that went well
    passes = [answer["forward"] for answer in loaded.forward if not answer.get("example")]
    results = [answer["forward"] for answer in loaded.forward]
    statuses: tuple[tuple[Status, list[dict[str, str]]], ...] = (("failed", results), ("skipped", passes or results))
    for status, among in statuses:
        for result in among:
            if result["status"] == status:
                return status, str(result["detail"])
    return "passed", "; ".join(str(result["detail"]) for result in results)
