"""Carry out a plan: stream every model, take over the rest, write the manifest last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from aoconvert.checkpoint import manifest
from aoconvert.checkpoint.manifest import ComponentEntry, FileEntry, Manifest, UnquantizedEntry
from aoconvert.engine.acceleration import prepare_kernels
from aoconvert.engine.conversion import run_component
from aoconvert.engine.manifest_entries import (
    RunClock,
    component_entry,
    environment_entry,
    pipeline_entry,
    run_entry,
    source_entry,
    tool_entry,
    unquantized_entry,
)
from aoconvert.engine.memory import steady_allocator
from aoconvert.engine.model_config import model_config, quantization_config
from aoconvert.engine.read import ComponentReading
from aoconvert.engine.results import ComponentResult, QuantizeResult, Seconds
from aoconvert.engine.resume import Journal
from aoconvert.engine.staging import Stage, staged_output
from aoconvert.engine.take_over import take_over
from aoconvert.errors import SourceError
from aoconvert.formats.digest import FileDigest
from aoconvert.models import join
from aoconvert.planning import ComponentPlan, Plan
from aoconvert.planning.copying import unread_pickles
from aoconvert.planning.files import index_name
from aoconvert.planning.types import StreamedPlan
from aoconvert.progress import Progress


@dataclass(frozen=True)
class Making:
    """Another way to make the tensors of a component than to quantize a source's.

    Attributes:
        verb: what a progress bar calls it.
        write: writes a component's tensors to its files, but for those that the journal has already; gives also the
            SHA-256 of each file that it read, by its path in the source.
        describe: adds to what the manifest says of a component.
    """

    verb: str
    write: Callable[[ComponentPlan, Journal, Progress], tuple[ComponentResult, Mapping[str, str]]]
    describe: Callable[[ComponentPlan, ComponentEntry], ComponentEntry]


def run(
    plan: Plan,
    progress: Progress,
    *,
    command: str,
    resume: bool = True,
    begun: Mapping[Path, FileDigest] | None = None,
    making: Making | None = None,
) -> QuantizeResult:
    """Carry out ``plan``. The output appears under its name only when it is whole.

    Args:
        plan: made with the same versions, its source's files local.
        progress: is told what happens.
        command: the command line that makes the result again, for the manifest.
        resume: go on with what an earlier run left; otherwise start afresh.
        begun: digests of weights files that were hashed in part already.
        making: makes the tensors of the components; by default they are quantized.

    Raises:
        AoconvertError: what stays for the next run after which errors, ``staging.staged_output`` says.
    """
    steady_allocator()
    clock = RunClock()
    with staged_output(plan.output, plan.needs.host_peak_bytes) as stage, closing(Journal(plan, stage)) as journal:
        unused = journal.open(resume, progress)
        stage.announce(_written_files(plan))
        resumed = stage.kept
        journal.digests = _begun_digests(plan, begun) | journal.digests
        conversion = _Conversion(plan, stage, journal, progress, making)
        components = conversion.write_components()
        unquantized, copied = conversion.write_the_rest()
        written = Manifest(
            schema_version=1,
            tool=tool_entry(),
            source=source_entry(plan, conversion.read_files),
            environment=environment_entry(plan.device),
            pipeline=pipeline_entry(plan.layout),
            components=components,
            unquantized=unquantized,
            copied=copied,
            left_behind=[manifest.LeftBehindEntry(path=item.path, reason=item.reason) for item in plan.left_behind],
            run=run_entry(clock, command, plan.devices, conversion.seconds),
        )
        stage.publish(manifest.encode(written))
    for component in plan.components if making is None else ():  # the result is in its place
        prepare_kernels(plan.devices[0], component.tensors)
    warnings = (*plan.warnings, *([f"the earlier run's work cannot be used: {unused}"] if unused else []))
    return QuantizeResult.of(plan, written, warnings, resumed)


def _begun_digests(plan: Plan, begun: Mapping[Path, FileDigest] | None) -> dict[str, FileDigest]:
    """What was hashed in part already, by path in the source."""
    if not begun:
        return {}
    paths = {path for model in plan.streamed if model.weights for path in model.weights.files}
    return {path: begun[local] for path in paths if (local := plan.source.local(path)) in begun}


def _written_files(plan: Plan) -> set[str]:
    """Every file that the run writes, by its path in the output."""
    found = {file.path for model in plan.streamed for file in model.files} | {item.path for item in plan.copied}
    found |= {join(component.folder, "config.json") for component in plan.components}
    return found | {_index_path(model) for model in plan.streamed if len(model.files) > 1}


def _index_path(model: StreamedPlan) -> str:
    return join(model.folder, index_name(model.component, model.format))


@dataclass
class _Conversion:
    """Writes everything but the manifest.

    Attributes:
        read_files: weights files of the source that were read.
        seconds: time that each stage of the engine was at work.
    """

    plan: Plan
    stage: Stage
    journal: Journal
    progress: Progress
    making: Making | None = None
    read_files: dict[str, FileEntry] = field(default_factory=dict)
    seconds: Seconds = field(default_factory=Seconds)

    def write_components(self) -> list[ComponentEntry]:
        """Quantize every component, or make its tensors in another way."""
        making = self.making
        verb = "quantize" if making is None else making.verb
        self.progress.start(verb, sum(item.totals.bytes_in for item in self.plan.components))
        entries = []
        for component in self.plan.components:
            if making is None:
                done = self._stream(component, self.plan.devices, allow_cpu=self.plan.allow_cpu)
            else:
                done, digests = making.write(component, self.journal, self.progress)
                self._note(digests)
            others = [self._write_config(component), *self._write_index(component)]
            entry = component_entry(self.plan, component, done, others)
            entries.append(entry if making is None else making.describe(component, entry))
        self.progress.finish()
        return entries

    def write_the_rest(self) -> tuple[list[UnquantizedEntry], list[FileEntry]]:
        """Write the parts that are not quantized, tensor by tensor, and copy the other files."""
        plan, copied = self.plan, self.plan.copied
        self.progress.start("copy", sum(item.bytes_in for item in plan.unquantized) + sum(c.size for c in copied))
        entries = []
        for part in plan.unquantized:
            done = self._stream(part, ("cpu",))
            entries.append(unquantized_entry(part, done, self._write_index(part)))
        for problem in unread_pickles(plan.source, copied):  # those of the Hub were not here for the plan
            raise SourceError(problem)
        files = take_over(self.stage, plan.source, copied, self.progress)
        self.progress.finish()
        return entries, files

    def _stream(self, model: StreamedPlan, devices: Sequence[str], *, allow_cpu: bool = False) -> ComponentResult:
        with ComponentReading(model, self.plan, self.stage.root, self.journal.digests) as reading:
            done = run_component(model, reading, self.journal, devices, self.progress, allow_cpu=allow_cpu)
            self._note(reading.digests())
        self.seconds += done.seconds
        return done

    def _note(self, digests: Mapping[str, str]) -> None:
        """Take down which weights files of the source were read, by their SHA-256."""
        files = self.plan.source.files()
        self.read_files |= {
            path: FileEntry(path=path, size=files[path].size, sha256=digest) for path, digest in digests.items()
        }

    def _write_config(self, component: ComponentPlan) -> FileEntry:
        model = component.component
        quantization = None
        if component.schemes:  # a migration may leave nothing quantized
            quantization = quantization_config(model.library, component.config, component.skip_modules)
        config = model_config(model.library, model.config, quantization, component.dtype)
        return self.stage.write_text(join(component.folder, "config.json"), config)

    def _write_index(self, model: StreamedPlan) -> list[FileEntry]:
        """The index of a model in several files; nothing for one."""
        if len(model.files) < 2:
            return []
        where = {t.name: Path(t.file).name for t in model.tensors if t.file is not None}
        return [self.stage.write_index(_index_path(model), where, sum(t.bytes_out for t in model.tensors))]
