"""One cell of the table: a scheme on a family, quantized, compared with torchao, opened and used."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from helpers import tiny
from helpers.bits import assert_same
from table.families import FAMILIES, TRANSFORMERS, Checkpoints
from table.reference import expected

import aoconvert
from aoconvert import schemes
from aoconvert.checkpoint.manifest import ComponentEntry, LayoutEntry
from aoconvert.errors import PlanError

Cell = dict[str, Any]


class LostValues(Exception):
    """A layer made NaN of values that it should have multiplied."""


# the layouts of int4wo are schemes of their own here
ROWS = tuple(
    row
    for entry in schemes.catalogue()
    for row in ([f"int4wo/{device}" for device in ("cpu", "cuda", "xpu")] if entry.name == "int4wo" else [entry.name])
)
# what the smallest models are too small for: 128 x 128 in a block, and scales in tiles of 128 rows for every expert
_WIDE = {("float8dq_block", family) for family in FAMILIES} | {("nvfp4", "mixtral")}


@dataclass
class Table:
    """Makes cells; sources and models are shared between them."""

    root: Path
    checkpoints: Checkpoints = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.root)

    def cell(self, row: str, family_name: str) -> Cell:
        """What came of a scheme on a family.

        Returns:
            ``{"empty": why}``, or ``equal`` (who made what it is bit-equal to), ``quantized`` (fraction of the
            parameters outside embeddings), ``opens`` (``from_pretrained``, or ``assign`` and ``because`` of what) and
            ``forward`` (``ran``, what it needs, or why it gives NaN); where there are any, ``imports`` beyond torchao
            that come before; of a mixture also ``experts``.

        Raises:
            AssertionError: a tensor that torchao makes otherwise, or that is another one once the result was opened.
            Exception: the result does not open, or does not run here although its layout says that it can.
        """
        output = self.root / "out"
        shutil.rmtree(output, ignore_errors=True)
        wide = (row, family_name) in _WIDE
        family = self.checkpoints.family(family_name, wide)
        name, _, layout_device = row.partition("/")
        options: dict[str, Any] = {"group_size": 32, "layout_device": layout_device} if layout_device else {}
        try:
            result = aoconvert.quantize(
                self.checkpoints.source(family_name, wide),
                name,
                output=output,
                device="cpu",
                min_quantized=0,
                **options,
            )
        except PlanError as error:
            return {"empty": "; ".join(error.problems)}
        [component] = result.manifest.components
        scheme = schemes.get(name, **options)
        quantized = {tensor.name for tensor in component.tensors if tensor.action == "quantize"}
        state, who = expected(self.checkpoints.model(family_name, wide), scheme, quantized)
        written = _written(output, component)
        _compare(component, written, state)
        record: Cell = {"equal": who, "quantized": round(result.quantized_fraction, 3)}
        if len(component.imports) > 1:
            record["imports"] = component.imports[1:]
        if family_name == "mixtral":
            stacks = {tensor.reason for tensor in component.tensors if len(tensor.shape) == 3}
            record["experts"] = "; ".join(sorted(reason or "quantized" for reason in stacks))
        opened = _open(family, output, record)
        part = getattr(opened, family.component) if family.component else opened
        _in_place(part, written, quantized, scheme.entry.tensor_class.name)
        part = None if wide and family_name not in TRANSFORMERS else part  # a denoiser alone is not used
        record["forward"] = _forward(family, opened, part, component.layout)
        return record


def _written(output: Path, component: ComponentEntry) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in component.files:
        if file.path.endswith(".bin"):
            found |= torch.load(output / file.path, weights_only=True, mmap=True)
    return found


def _compare(component: ComponentEntry, written: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    tied = {tensor.name for tensor in component.tensors if tensor.action == "tied"}
    assert set(written) | tied == set(state)
    assert not set(written) & tied
    for name, tensor in written.items():
        assert_same(tensor, state[name], name)


def _open(family: tiny.Family, output: Path, record: Cell) -> Any:
    try:
        opened = tiny.open_result(family, output)
    except Exception as error:  # whatever the library raises for what it cannot open
        record |= {"opens": "assign", "because": f"{type(error).__name__}: {error}".splitlines()[0]}
        return aoconvert.load(output)
    record["opens"] = "from_pretrained"
    return opened


def _in_place(part: torch.nn.Module, written: dict[str, torch.Tensor], quantized: set[str], kind: str) -> None:
    """The quantized parameters of what was opened are those that were written, and all others are plain."""
    parameters = dict(part.named_parameters())
    for name, parameter in parameters.items():
        plain = type(parameter.data) in (torch.Tensor, torch.nn.Parameter)
        assert plain == (name not in quantized), name
    for name in quantized:
        assert type(parameters[name].data).__name__ == kind, name
        assert_same(parameters[name].data, written[name], name)


def _forward(family: tiny.Family, opened: Any, part: torch.nn.Module | None, layout: LayoutEntry) -> str:
    needs = layout.device if layout.device not in ("any", "cpu") else None
    if layout.min_capability:
        needs = f"cuda, compute capability {'.'.join(map(str, layout.min_capability))}"
    if part is None:
        assert needs is not None
        return f"needs {needs}"
    hooks = [module.register_forward_hook(_only_zeros_are_lost) for module in part.modules() if is_linear(module)]
    try:
        with torch.no_grad():
            output = family.step(opened)
    except Exception as error:
        if needs is None or isinstance(error, LostValues):
            raise
        return f"needs {needs}"
    finally:
        for hook in hooks:
            hook.remove()
    return (
        "ran"
        if output.isfinite().all()
        else "NaN: torchao computes no valid scale for a row of zeros in the activations"
    )


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def _only_zeros_are_lost(module: torch.nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    """A linear layer makes NaN of nothing but rows of zeros, and those only where its activations are float8."""
    rows, results = given[0].flatten(0, -2), output.flatten(0, -2)
    lost = ~results.isfinite().all(1) & rows.isfinite().all(1)
    kwargs = getattr(module.weight.data, "act_quant_kwargs", None)
    zeros = (rows == 0).all(1) if "Float8" in type(kwargs).__name__ else torch.zeros_like(lost)
    if (lost & ~zeros).any():
        raise LostValues(f"{module} makes NaN of finite values")
