"""What can be drawn of several results together: their reports of ``eval`` and ``bench``, of the same work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.bench import Bench, BenchRow, bench_of
from aoconvert.checkpoint.evaluation import Evaluation, Metrics, evaluation_of
from aoconvert.errors import SourceError

METRICS = {
    "kl_mean": ("KL divergence to the original, nats (lower is better)", True),
    "psnr_mean": ("PSNR to the original, dB (higher is better)", False),
    "output_sqnr_db": ("SQNR of the output, dB (higher is better)", False),
}
"""Key of the metrics → what the axis says, and whether it begins at nothing."""
_UNITS = ("image", "video", "denoising step", "call", "generated token", "prompt token", "sentence", "forward pass")
_WEIGHTS = (".bin", ".safetensors")


@dataclass(frozen=True)
class Mark:
    """A result in a diagram: where it is, and its number, by which it has one colour in all of them.

    The original has the number -1.
    """

    name: str
    x: float
    y: float
    number: int


@dataclass(frozen=True)
class Diagram:
    """One diagram.

    Attributes:
        title: above it.
        x_label: of the axis; its values are bytes.
        y_label: of the other one.
        marks: the results.
        from_zero: the second axis begins at nothing.
        seconds: its values are seconds.
    """

    title: str
    x_label: str
    y_label: str
    marks: tuple[Mark, ...]
    from_zero: bool
    seconds: bool = False


@dataclass
class Comparable:
    """Diagrams, and what is in none of them: (name, reason)."""

    diagrams: list[Diagram] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Result:
    name: str
    number: int
    size: int
    bench: Bench | None
    evaluation: Evaluation | None

    @property
    def data(self) -> str | None:
        """What the evaluation put into the models."""
        return self.evaluation.data.sha256 if self.evaluation is not None else None


def compare_reports(folders: Sequence[Path]) -> Comparable:
    """Read the reports in the folders of results.

    Raises:
        SourceError: a folder is no result, or no report is in any of them.
    """
    results = [_read(folder, number) for number, folder in enumerate(folders)]
    if not any(result.bench or result.evaluation for result in results):
        raise SourceError(
            f"no report of this checkpoint in {', '.join(str(folder) for folder in folders)}",
            hint="run aoconvert bench PATH, or aoconvert eval PATH, for each first",
        )
    found = Comparable()
    _add_errors(results, found)
    _add_times(results, found)
    return found


def _read(folder: Path, number: int) -> _Result:
    manifest = manifests.load(folder)
    size = sum(file.size for file in manifest.files() if file.path.endswith(_WEIGHTS))
    return _Result(folder.resolve().name, number, size, bench_of(folder), evaluation_of(folder))


def _add_errors(results: Sequence[_Result], found: Comparable) -> None:
    """Size against the first figure that any result has, of those that were compared on the same data."""
    figures = {
        (result.number, key): value
        for result in results
        for key in METRICS
        if (value := getattr(_metrics(result.evaluation), key, None)) is not None
    }
    key = next((key for key in METRICS if any(of == key for _, of in figures)), None)
    if key is None:
        return
    data = Counter(result.data for result in results if (result.number, key) in figures).most_common(1)[0][0]
    marks = []
    for result in results:
        value = figures.get((result.number, key))
        if value is None:
            found.left_out.append((result.name, f"its aoconvert.eval.json has no {key}, or is not there"))
        elif result.data != data:
            found.left_out.append((result.name, "its aoconvert.eval.json is of other data than the others'"))
        else:
            marks.append(Mark(result.name, result.size, value, result.number))
    label, from_zero = METRICS[key]
    found.diagrams.append(Diagram("Size and error", "size of the weights", label, tuple(marks), from_zero))


def _metrics(evaluation: Evaluation | None) -> Metrics | None:
    return evaluation.components[0].metrics if evaluation is not None and evaluation.components else None


def _add_times(results: Sequence[_Result], found: Comparable) -> None:
    """Model memory against time, of the rows that did the same work on the same device."""
    rows = {result.number: list(_plain_rows(result.bench)) for result in results}
    kinds = Counter(kind for number in rows for kind in {_kind(results[number].bench, row) for row in rows[number]})
    if not kinds:
        return
    chosen = min(kinds, key=lambda kind: (-kinds[kind], _rank(kind[0]), kind))
    marks, original = [], None
    for result in results:
        same = [row for row in rows[result.number] if _kind(result.bench, row) == chosen]
        for row in same:
            mark = Mark(row.scheme, row.model_bytes or 0, 1 / (row.per_second or 1), -1)
            original = original or (mark if row.model == "source" else None)
        own = [row for row in same if row.model == "result"]
        if not own:
            found.left_out.append((result.name, f"its aoconvert.bench.json has no row for {_describe(chosen)}"))
        marks += [Mark(result.name, row.model_bytes or 0, 1 / (row.per_second or 1), result.number) for row in own[:1]]
    if original is not None:
        marks.append(Mark(f"original, {original.name}", original.x, original.y, original.number))
    unit, workload, batch, device = chosen
    sizes = ", ".join(part for part in (workload, f"batch {batch}", device) if part)
    found.diagrams.append(Diagram(f"Time: {sizes}", "model memory", f"per {unit}", tuple(marks), True, seconds=True))


_Kind = tuple[str, str, int, str]


def _plain_rows(bench: Bench | None) -> Iterable[BenchRow]:
    for row in bench.rows if bench is not None else ():
        if row.error is None and row.mode == "plain" and row.model_bytes and row.per_second:
            yield row


def _kind(bench: Bench | None, row: BenchRow) -> _Kind:
    """What must be the same for two rows to be compared."""
    assert bench is not None
    facts = bench.environment
    return (
        row.unit,
        row.workload or "",
        row.batch_size,
        facts.get("device_name") or facts.get("device") or "",
    )


def _rank(unit: str) -> int:
    return _UNITS.index(unit) if unit in _UNITS else len(_UNITS)


def _describe(kind: _Kind) -> str:
    unit, workload, batch, device = kind
    return f"{unit} ({workload}), batch {batch}, on {device}"
