"""One row of the table: a tiny class quantized to int8, against torchao's ``quantize_`` on the library's own model."""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from classes.shrink import Changes, build, class_of
from helpers.bits import assert_same
from table.reference import quantize_named

import aoconvert
from aoconvert import inputs, schemes
from aoconvert.errors import AoconvertError
from aoconvert.inputs import Found, NoInputs, find_inputs, first_tensors, from_libraries
from aoconvert.verification.children import forward_pass

SCHEME = "int8wo"


@dataclass
class Row:
    """What came of a class.

    Attributes:
        library, class_name: of the class.
        quantized: percent of the parameters outside embeddings; ``None`` where nothing was converted.
        tensors: ``equal`` where every parameter and buffer is, or what differs.
        forward: ``equal``, what differs, or why there is none.
        verify: of the check ``forward`` of ``verify``, run in this process.
        note: a refusal, what is refused by default, an original that does not run.
    """

    library: str
    class_name: str
    quantized: int | None = None
    tensors: str = "-"
    forward: str = "-"
    verify: str = "-"
    note: str = ""
    seconds: float = 0.0

    @property
    def title(self) -> str:
        return f"{self.library}:{self.class_name}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_row(title: str, changes: Changes, folder: Path) -> Row:
    """Build, save, quantize, open, compare and run one class.

    Args:
        title: ``LIBRARY:CLASS``.
        changes: what makes its default config small.
        folder: an empty one for its files.
    """
    library, _, name = title.partition(":")
    row, began = Row(library, name), time.monotonic()
    source, output = folder / "source", folder / "out"
    for path in (source, output):
        shutil.rmtree(path, ignore_errors=True)
    try:
        _fill(row, source, output, changes)
    except Exception as error:  # a row for every class, whatever its library raises
        row.note = _joined(row.note, f"{type(error).__name__}: {error}")
    row.seconds = round(time.monotonic() - began, 1)
    return row


def _fill(row: Row, source: Path, output: Path, changes: Changes) -> None:
    cls: Any = class_of(row.library, row.class_name)
    model: Any = build(row.library, row.class_name, changes)
    try:
        model.save_pretrained(source)
        cls.from_pretrained(source)
    except Exception as error:
        row.note = f"the library does not save and open it: {_line(error)}"
        return
    try:
        result = aoconvert.quantize(source, SCHEME, output=output, device="cpu", min_quantized=0)
    except AoconvertError as error:
        row.note = f"refused: {_line(error)}"
        return
    [component] = result.manifest.components
    row.quantized = round(100 * result.quantized_fraction)
    row.note = "by default refused (< 50 %)" if result.quantized_fraction < 0.5 else ""
    dtype = {_DTYPE[row.library]: getattr(torch, component.dtype)}
    original, theirs = (cls.from_pretrained(source, **dtype).eval() for _ in range(2))
    names = {tensor.name for tensor in component.tensors if tensor.action == "quantize"}
    parameters = dict(theirs.named_parameters(remove_duplicate=False))
    shared = {parameters[name].data_ptr() for name in names}
    names |= {name for name, parameter in parameters.items() if parameter.data_ptr() in shared}
    config: Any = schemes.get(SCHEME).config
    quantize_named(theirs, dataclasses.replace(config, set_inductor_config=False), names)
    options = {key: getattr(torch, str(value), value) for key, value in component.load.kwargs.items()}
    ours = cls.from_pretrained(output, **options).eval()
    row.tensors = _compare(ours, theirs)
    if hasattr(ours.config, "_experts_implementation"):
        theirs.set_experts_implementation(ours.config._experts_implementation)
    try:
        found = find_inputs(original, from_libraries(original))
    except NoInputs as error:
        row.note = _joined(row.note, f"no input: {_line(error)}")
        row.verify = "skipped"
        return
    row.forward = _run(row, found, theirs, ours)
    row.verify = _checked(row, found, ours)


_DTYPE = {"diffusers": "torch_dtype", "transformers": "dtype"}


def _compare(ours: torch.nn.Module, theirs: torch.nn.Module) -> str:
    """Every parameter and every buffer, those that no file holds too."""
    found = {**dict(ours.named_parameters(remove_duplicate=False)), **dict(ours.named_buffers())}
    wanted = {**dict(theirs.named_parameters(remove_duplicate=False)), **dict(theirs.named_buffers())}
    if set(found) != set(wanted):
        return f"{sorted(set(found) ^ set(wanted))[0]} is only in one"
    kept = set(ours.state_dict())
    different = []
    for name, tensor in found.items():
        try:
            assert_same(tensor.data, wanted[name].data, name)
        except AssertionError:
            different.append(name)
    if not different:
        return "equal"
    if not set(different) & kept:
        return "equal*"  # but for buffers that no file holds
    return f"{next(name for name in different if name in kept)} differs"


def _run(row: Row, found: Found, theirs: Any, ours: Any) -> str:
    outcomes = []
    for model in (theirs, ours):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            try:
                outcomes.append(first_tensors(model(**found.make())))
            except Exception as error:
                outcomes.append(_line(error))
    expected_output, output = outcomes
    if isinstance(output, str):
        row.note = _joined(row.note, f"result: {output}")
        return "FAILS"
    if isinstance(expected_output, str):
        row.note = _joined(row.note, f"quantize_ in memory: {expected_output}")
        return "runs"
    same = len(output) == len(expected_output) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(output, expected_output, strict=True)
    )
    return "equal" if same else "differs"


def _checked(row: Row, found: Found, ours: Any) -> str:
    answer = forward_pass.run_forward(ours, found, inputs)
    if answer["status"] != "passed":
        row.note = _joined(row.note, answer["detail"])
    return {"passed": "ok", "failed": "FAIL", "skipped": "skipped"}[answer["status"]]


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _joined(*notes: str) -> str:
    return "; ".join(note.replace("\n", " ")[:240] for note in notes if note)
