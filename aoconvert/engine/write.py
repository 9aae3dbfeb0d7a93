"""The last stage: finished tensors go into their files."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aoconvert.engine.channel import Channel
from aoconvert.engine.messages import Begin, End, Message, Rows, Whole
from aoconvert.engine.results import Seconds, TensorResult
from aoconvert.formats.base import SealedFile, TensorSink, Writer, WrittenTensor
from aoconvert.formats.digest import Mark
from aoconvert.planning.types import StreamedPlan
from aoconvert.progress import Progress

if TYPE_CHECKING:
    from aoconvert.engine.resume import Journal


@dataclass
class FileWriter:
    """Writes a component's tensors file by file; a file is sealed when its last tensor has passed.

    Attributes:
        plan: the component.
        journal: opens the files, and notes each tensor and file that is finished.
        marks: what was read of which weights file until a tensor was read, by the tensor's name.
        progress: is told of each tensor.
        tensors: the results by name, those of an earlier run among them; filled.
        files: the sealed files by output path, those of an earlier run among them; filled.
        seconds: the writer's time is added.
    """

    plan: StreamedPlan
    journal: Journal
    marks: Callable[[str], Mapping[str, Mark]]
    progress: Progress
    tensors: dict[str, TensorResult]
    files: dict[str, SealedFile]
    seconds: Seconds

    def run(self, source: Channel[Message]) -> None:
        """Write what comes until the channel ends; when that fails, files stay as they are for a later run.

        Raises:
            WriteError: disk full or another write error.
            Closed: another stage failed.
        """
        left = self._left()
        writer: Writer | None = None
        sink: TensorSink | None = None
        try:
            for whole in [path for path, count in left.items() if not count and path not in self.files]:
                writer = self.journal.writer(self.plan.format, whole)
                self._seal(whole, writer)
                writer = None
            while (message := source.get()) is not None:
                plan = message.plan
                path = plan.file
                assert path is not None
                began = time.perf_counter()
                if writer is None:
                    writer = self.journal.writer(self.plan.format, path)
                written: WrittenTensor | None = None
                match message:
                    case Whole():
                        written = writer.add(plan.name, message.tensor)
                        message.release()
                    case Begin():
                        sink = writer.begin(plan.name, message.like)
                    case Rows():
                        assert sink is not None
                        sink.put(message.rows)
                        message.release()
                    case End():
                        assert sink is not None
                        written = sink.finish(message.rest)
                if isinstance(message, Whole | End):
                    assert written is not None
                    result = self.tensors[plan.name] = TensorResult.of(written, message.error, message.device)
                    self.journal.done(path, result, writer.last(), self.marks(plan.name))
                    left[path] -= 1
                    self.progress.advance(plan.bytes_in, plan.name)
                if not left[path]:
                    self._seal(path, writer)
                    writer = None
                self.seconds.writer += time.perf_counter() - began
                del message
        finally:
            if writer is not None:
                writer.leave()

    def _left(self) -> dict[str, int]:
        """How many tensors each file still lacks."""
        left = {file.path: 0 for file in self.plan.files}
        for tensor in self.plan.tensors:
            if tensor.file is not None and tensor.is_written:
                left[tensor.file] += tensor.name not in self.tensors
        return left

    def _seal(self, path: str, writer: Writer) -> None:
        here = [tensor for tensor in self.plan.tensors if tensor.file == path]
        also = {tensor.name: tensor.same_as for tensor in here if tensor.same_as is not None}
        sealed = writer.seal([tensor.name for tensor in here], also)
        self.journal.done_file(path, sealed)
        self.files[path] = sealed
