"""Stacks of experts: 3-D parameters that a mixture multiplies expert by expert.

transformers 5 keeps all experts of a layer in one parameter, and multiplies them in one of several ways
(``experts_implementation``): one matrix product after the other (``eager``), or one grouped product of the whole stack
(``grouped_mm``, the default). Whether torchao's tensor of a scheme can be multiplied so is not written anywhere: the
module's own forward is asked, with two experts of zeros.
Source: ``transformers.integrations.moe``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from aoconvert.models.base import Skeleton

if TYPE_CHECKING:
    import torch
    from torch import nn

DEFAULT = "grouped_mm"
# batched_mm copies a matrix for every token; it indexes the stack, which no torchao tensor can do here
IMPLEMENTATIONS = (DEFAULT, "eager")

_EXPERTS = 2
_SECONDS = 120.0  # of CPU time for a forward
_INNER = 256  # columns of the down projection that take part in the trial: a multiple of any group size in use

S = TypeVar("S")


@dataclass(frozen=True)
class Settled:
    """How a model's quantized experts are multiplied.

    Attributes:
        implementation: what its ``config.json`` has to name as ``experts_implementation``, which ``from_pretrained``
            obeys; ``None`` where the default can be used.
        refused: state-dict key → why it cannot be quantized.
    """

    implementation: str | None
    refused: Mapping[str, str]


def settle(skeleton: Skeleton, wanted: Mapping[str, S], quantize: Callable[[torch.Tensor, S], torch.Tensor]) -> Settled:
    """Find out which stacks of experts can be quantized as wanted.

    Args:
        skeleton: the empty model.
        wanted: state-dict key of a tensor of kind ``experts`` → its scheme.
        quantize: gives what is written for a weight on ``meta``, also on ``meta``.
    """
    modules: dict[str, dict[str, S]] = {}
    for name, scheme in wanted.items():
        owner, _, parameter = name.rpartition(".")
        modules.setdefault(owner, {})[parameter] = scheme
    if skeleton.model is None:
        return Settled(None, dict.fromkeys(wanted, _not_dispatched(skeleton)))
    dtype = next(spec.dtype for spec in skeleton if spec.kind == "experts")
    tried: dict[Any, dict[str, str | None]] = {}
    outcomes: dict[str, dict[str, str | None]] = {}
    for owner, schemes in modules.items():
        module = skeleton.model.get_submodule(owner)
        shapes = tuple((name, tuple(value.shape)) for name, value in module.named_parameters())
        key = (type(module), shapes, tuple((name, id(scheme)) for name, scheme in schemes.items()))
        if key not in tried:
            tried[key] = _try(skeleton, module, schemes, quantize, dtype)
        outcomes[owner] = tried[key]
    implementation = _common(outcomes.values())
    refused = {
        f"{owner}.{parameter}": why
        for owner, outcome in outcomes.items()
        if (why := outcome[implementation]) is not None
        for parameter in modules[owner]
    }
    return Settled(implementation if implementation != DEFAULT and len(refused) < len(wanted) else None, refused)


def _common(outcomes: Iterable[Mapping[str, str | None]]) -> str:
    """The implementation that most modules can use; the default where that makes no difference."""
    return max(IMPLEMENTATIONS, key=lambda name: sum(outcome[name] is None for outcome in outcomes))


def _not_dispatched(skeleton: Skeleton) -> str:
    library = skeleton.component.library
    return f"a stack of experts that its class multiplies with its own code; {library} has no alternative"


def _try(
    skeleton: Skeleton,
    module: nn.Module,
    schemes: Mapping[str, S],
    quantize: Callable[[torch.Tensor, S], torch.Tensor],
    dtype: torch.dtype,
) -> dict[str, str | None]:
    """Implementation → ``None`` where a forward of the module runs, or why it does not."""
    import torch

    from aoconvert.models.deadline import deadline

    if not _is_dispatched(module):
        return dict.fromkeys(IMPLEMENTATIONS, _not_dispatched(skeleton))
    try:
        probe, width = _trial(module, dtype, _INNER)
        kinds = _quantize(probe, schemes, quantize)
    except Exception:  # not a multiple of what the scheme groups
        probe, width = _trial(module, dtype, None)
        kinds = _quantize(probe, schemes, quantize)
    outcome: dict[str, str | None] = {}
    for implementation in IMPLEMENTATIONS:
        config: Any = probe.config
        config._experts_implementation = implementation
        try:
            with deadline(_SECONDS), torch.no_grad():
                probe(
                    torch.zeros(_EXPERTS, width, dtype=dtype),
                    torch.arange(_EXPERTS).unsqueeze(1),
                    torch.ones(_EXPERTS, 1, dtype=dtype),
                )
        except Exception as error:  # an operation that a tensor class lacks may end in anything
            outcome[implementation] = (
                f"{type(module).__name__} cannot multiply a stack of {' and '.join(kinds)} ({type(error).__name__})"
            )
        else:
            outcome[implementation] = None
    return outcome


def _quantize(
    probe: nn.Module, schemes: Mapping[str, S], quantize: Callable[[torch.Tensor, S], torch.Tensor]
) -> list[str]:
    """Replace the parameters by what is written for them; the names of the classes that they are then."""
    import torch

    kinds = set()
    for name, scheme in schemes.items():
        written = quantize(probe.get_parameter(name).data.to("meta"), scheme)
        kinds.add(type(written).__name__)
        probe._parameters[name] = torch.nn.Parameter(_fill_with_zeros(written), requires_grad=False)
    return sorted(kinds)


def _is_dispatched(module: nn.Module) -> bool:
    """Whether transformers' decorator ``use_experts_implementation`` made it."""
    if not all(hasattr(module, name) for name in ("is_transposed", "has_gate", "num_experts", "config")):
        return False
    return {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"} <= set(module._parameters)


def _trial(module: Any, dtype: torch.dtype, inner: int | None) -> tuple[nn.Module, int]:
    """A small copy of the module on the CPU, and how wide its input is.

    Only what the decorator promises is used: the names of the projections, which way round they lie, and that
    ``num_experts`` counts them. The width between the projections is made small, at most ``inner``; the outer one
    stays, as other parts of the module depend on it.
    """
    import torch

    up, down = "gate_up_proj" if module.has_gate else "up_proj", "down_proj"
    parts = 2 if module.has_gate else 1
    shapes = {name: list(value.shape) for name, value in module._parameters.items() if value is not None}
    columns, rows = (1, 2) if module.is_transposed else (2, 1)
    small = shapes[down][columns] if inner is None else min(inner, shapes[down][columns])
    shapes[up][rows] = parts * small
    shapes[down][columns] = small
    if f"{up}_bias" in shapes:
        shapes[f"{up}_bias"][-1] = parts * small
    probe = copy(module)
    probe._parameters = {
        name: torch.nn.Parameter(torch.zeros([_EXPERTS, *shape[1:]], dtype=dtype), requires_grad=False)
        if shape and shape[0] == module.num_experts
        else torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
        for name, shape in shapes.items()
    }
    probe._modules = {name: child and deepcopy(child).to_empty(device="cpu") for name, child in module._modules.items()}
    probe.num_experts = _EXPERTS
    probe.config = deepcopy(module.config)
    return probe, shapes[up][columns]


def _fill_with_zeros(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with zeros in memory in place of ``meta``."""
    import torch

    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return torch.zeros_like(tensor, device="cpu")
    names, context = flatten()
    inner = {name: _fill_with_zeros(getattr(tensor, name)) for name in names}
    filled: torch.Tensor = type(tensor).__tensor_unflatten__(inner, context, None, None)  # type: ignore[attr-defined]
    return filled
