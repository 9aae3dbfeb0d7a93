"""What is finished of a run: written down as it goes, and taken up again by the next run after a stop.

Of an earlier run's journal nothing is believed: the output files are hashed up to the last tensor whose digest fits,
and so is what was read of the source. A tensor that passes is neither read nor quantized again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aoconvert.checkpoint.unfinished import JOURNAL_NAME
from aoconvert.engine.results import TensorResult
from aoconvert.engine.resume_file import (
    FileLine,
    JournalFile,
    Line,
    MarkLine,
    TensorLine,
    differences,
    read_journal,
    signature_of,
)
from aoconvert.errors import ReadError
from aoconvert.files import writing
from aoconvert.formats.base import SealedFile, StoredTensor, Writer, WrittenTensor
from aoconvert.formats.digest import FileDigest, Mark
from aoconvert.formats.hashing import Prefix, count_matching

if TYPE_CHECKING:
    from aoconvert.engine.staging import Stage
    from aoconvert.formats.registry import FileFormat
    from aoconvert.planning import Plan
    from aoconvert.planning.types import StreamedPlan, TensorPlan
    from aoconvert.progress import Progress

_MAX_SIZE = 1 << 62


@dataclass
class _File:
    """An output file: the lines about it, the tensors they stand for, and how far the file bears them out."""

    lines: list[TensorLine] = field(default_factory=list)
    stored: list[StoredTensor] = field(default_factory=list)
    prefix: Prefix = field(default_factory=Prefix)
    sealed: SealedFile | None = None


class Journal:
    """What is finished of a run, and where that is written down.

    Attributes:
        digests: of the source files that were read in part, by their path in the source.
    """

    def __init__(self, plan: Plan, stage: Stage) -> None:
        self._plan = plan
        self._stage = stage
        self._files: dict[str, _File] = {}
        self._heads = {file.path: file.head for model in plan.streamed for file in model.files}
        self._out: JournalFile | None = None
        stage.total = sum(t.is_written for model in plan.streamed for t in model.tensors)
        self.digests: dict[str, FileDigest] = {}

    def open(self, resume: bool, progress: Progress) -> str | None:
        """Find out what an earlier run left, keep what is sound, and remove the rest.

        Args:
            resume: go on with it; otherwise everything is removed.
            progress: is told of the bytes that are checked.

        Returns:
            Why the earlier run's work is not used, where there was any.

        Raises:
            ReadError: the source cannot be read.
            WriteError: disk full.
        """
        signature = self._signature()
        found = read_journal(self._stage.root / JOURNAL_NAME) if resume else None
        lines: list[Line] = []
        reason = None
        if found is not None and found[1]:
            changed = differences(found[0], signature)
            if changed:
                reason = ", ".join(changed)
            else:
                self._stage.kept = sum(isinstance(line, TensorLine) for line in found[1])
                lines, reason = self._recover(found[1], progress)
        if not lines:
            self._files.clear()
            self.digests.clear()
            self._stage.kept = 0
        self._stage.clear([JOURNAL_NAME, *(path for path, file in self._files.items() if file.stored)] if lines else [])
        self._out = JournalFile(self._stage.root / JOURNAL_NAME, signature, lines)
        self._stage.kept = sum(len(file.stored) for file in self._files.values())
        return reason

    def finished(self, plan: StreamedPlan) -> dict[str, TensorResult]:
        """The results of a component that need not be made again, by tensor name."""
        return {
            tensor.written.name: TensorResult(
                tensor.written, line.sqnr_db, line.max_abs_error, line.repaired, line.device
            )
            for path in _paths(plan)
            if (file := self._files.get(path))
            for line, tensor in zip(file.lines, file.stored, strict=True)
        }

    def sealed(self, plan: StreamedPlan) -> dict[str, SealedFile]:
        """The files of a component that are finished."""
        return {path: file.sealed for path in _paths(plan) if (file := self._files.get(path)) and file.sealed}

    def writer(self, format_: FileFormat, path: str) -> Writer:
        """Opens an output file, behind what it holds already.

        Raises:
            WriteError: disk full, or no permission.
        """
        target = self._stage.root / path
        file, head = self._files.get(path), self._heads[path]
        if file is not None and file.stored:
            return format_.writer(target, file.stored, file.prefix, head)
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        return format_.writer(target, head=head)

    def done(self, path: str, result: TensorResult, stored: StoredTensor, marks: Mapping[str, Mark]) -> None:
        """Write down a tensor that is in its file.

        Raises:
            WriteError: disk full.
        """
        written = result.written
        line = TensorLine(
            file=path,
            name=written.name,
            class_name=written.class_name,
            data_names=list(written.data_names),
            nbytes=written.nbytes,
            sha256=written.sha256,
            resume_state=stored.resume_state,
            size=stored.size,
            prefix=stored.sha256,
            sqnr_db=result.sqnr_db,
            max_abs_error=result.max_abs_error,
            repaired=result.repaired,
            device=result.device,
            source={file: _mark_line(mark) for file, mark in marks.items()},
        )
        self._append(line)
        self._stage.kept += 1

    def done_file(self, path: str, sealed: SealedFile) -> None:
        """Write down a file that is sealed.

        Raises:
            WriteError: disk full.
        """
        self._append(FileLine(file=path, size=sealed.size, sha256=sealed.sha256))

    def close(self) -> None:
        """Release the journal's file."""
        if self._out is not None:
            self._out.close()

    def _append(self, line: Line) -> None:
        assert self._out is not None
        self._out.append(line)

    def _signature(self) -> dict[str, Any]:
        try:
            return signature_of(self._plan)
        except OSError as error:
            raise ReadError(f"{error.filename}: {error.strerror}", hint="check the source") from error

    def _recover(self, lines: list[Line], progress: Progress) -> tuple[list[Line], str | None]:
        """The lines that hold, and where none do, why."""
        planned = {path: order for model in self._plan.streamed for path, order in _paths(model).items()}
        self._stage.clear([JOURNAL_NAME, *planned])
        self._files = {
            path: _fitting(lines, model, path, order, self._heads[path])
            for model in self._plan.streamed
            for path, order in _paths(model).items()
        }
        sealed = {line.file: line for line in lines if isinstance(line, FileLine)}
        ends = {path: file.stored[-1].size for path, file in self._files.items() if file.stored}
        sizes = [max(size, sealed[path].size if path in sealed else 0) for path, size in ends.items()]
        read = [max(mark.position for mark in marks) for marks in self._marks().values()]
        progress.start("resume", sum(sizes) + sum(read))
        for path in ends:
            whole = len(self._files[path].stored) == len(planned[path])
            self._check(path, sealed.get(path) if whole else None, progress)
        same = self._check_sources(progress)
        progress.finish()
        if not same:
            return [], "the source changed"
        kept: list[Line] = [line for file in self._files.values() for line in file.lines]
        kept += [sealed[path] for path, file in self._files.items() if file.sealed is not None]
        return kept, None if kept else "its files are damaged or gone"

    def _check(self, path: str, sealed: FileLine | None, progress: Progress) -> None:
        """Keep of an output file what its digests bear out."""
        file, target = self._files[path], self._stage.root / path
        marks = [(tensor.size, tensor.sha256) for tensor in file.stored]
        try:
            if sealed is not None and target.stat().st_size == sealed.size:
                marks.append((sealed.size, sealed.sha256))
            count, file.prefix = count_matching(target, marks, lambda nbytes: progress.advance(nbytes, path))
        except OSError:  # it is gone, or the disk lost it
            count = 0
        if sealed is not None and count > len(file.stored):
            names = sorted({name for tensor in file.stored for name in tensor.written.globals})
            file.sealed = SealedFile(target, sealed.size, sealed.sha256, tuple(names))
        del file.stored[count:], file.lines[count:]

    def _marks(self) -> dict[str, list[Mark]]:
        """What the tensors that are kept were read from."""
        found: dict[str, list[Mark]] = {}
        for file in self._files.values():
            for line in file.lines:
                for path, mark in line.source.items():
                    found.setdefault(path, []).append(_mark(mark))
        return found

    def _check_sources(self, progress: Progress) -> bool:
        """Whether what was read of the source is still the same."""
        for path, marks in self._marks().items():
            digest = FileDigest.resume(
                self._plan.source.local(path),
                marks,
                lambda nbytes, path=path: progress.advance(nbytes, path),  # type: ignore[misc]
            )
            if digest is None:
                return False
            self.digests[path] = digest
        return True


def _paths(plan: StreamedPlan) -> dict[str, list[TensorPlan]]:
    """The output files of a component, and the tensors of each in the order in which they are written."""
    plans = {tensor.name: tensor for tensor in plan.tensors}
    found: dict[str, list[TensorPlan]] = {}
    for name in plan.order:
        path = plans[name].file
        if path is not None:
            found.setdefault(path, []).append(plans[name])
    return found


def _fitting(lines: list[Line], model: StreamedPlan, path: str, order: list[TensorPlan], head: bytes) -> _File:
    """The lines about an output file that continue one another, in the plan's order."""
    sources = set(model.weights.files) if model.weights else set()
    mine = [line for line in lines if isinstance(line, TensorLine) and line.file == path]
    kept: list[TensorLine] = []
    for line, tensor in zip(mine, order, strict=False):
        if line.name != tensor.name or not all(map(_is_mark, line.source.values())) or not set(line.source) <= sources:
            break
        kept.append(line)
    stored = model.format.writer.restore([_stored(line) for line in kept], head)
    return _File(kept[: len(stored)], stored)


def _stored(line: TensorLine) -> StoredTensor:
    written = WrittenTensor(line.name, line.class_name, tuple(line.data_names), line.nbytes, line.sha256, frozenset())
    return StoredTensor(written, line.resume_state, line.size, line.prefix)


def _mark_line(mark: Mark) -> MarkLine:
    return MarkLine(position=mark.position, sha256=mark.sha256)


def _is_mark(line: MarkLine) -> bool:
    return line.position <= _MAX_SIZE


def _mark(line: MarkLine) -> Mark:
    return Mark(line.position, line.sha256)
