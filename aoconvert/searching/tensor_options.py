"""What could be quantized, to what, and how many bytes that takes: from configs and headers, with no weights read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from aoconvert.errors import WriteError
from aoconvert.humanize import plural
from aoconvert.models import TensorSpec
from aoconvert.options import QuantizeOptions
from aoconvert.planning.choices import SchemeChoice, Wishes, choose_schemes
from aoconvert.planning.decide import meta_output, nbytes
from aoconvert.planning.files import lay_out
from aoconvert.planning.types import ComponentPlan
from aoconvert.recipes.rules import Rule, Rules, skip_rules

if TYPE_CHECKING:
    import torch

    from aoconvert.schemes import Scheme

_ORIGIN = "auto"


@dataclass(frozen=True)
class Left(Rule):
    """A tensor that is left as it is.

    Attributes:
        why: the reason, without the tensor's name: it is for that tensor alone.
    """

    why: str

    @property
    def label(self) -> str:
        """The reason."""
        return self.why

    @property
    def reason(self) -> str:
        """No recipe says it: the search found it out."""
        return self.why


@dataclass
class Survey:
    """A component whose schemes are searched.

    Args:
        plan: of the component, whatever its schemes are.
        candidates: what may be chosen.
        options: what the user said.

    Attributes:
        allowed: tensor → the candidates that it can take, for tensors that can take one.
        unstorable: candidate → why the format of the files cannot hold it, and for how many tensors.
    """

    plan: ComponentPlan
    candidates: Sequence[Scheme]
    options: QuantizeOptions
    allowed: dict[str, list[Scheme]] = field(default_factory=dict)
    unstorable: dict[str, tuple[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import torch

        self._specs: dict[str, TensorSpec] = {spec.name: spec for spec in self.plan.skeleton}
        self._tensors = {tensor.name: tensor for tensor in self.plan.tensors}
        self._dtypes: dict[str, torch.dtype] = {spec.name: spec.dtype for spec in self.plan.skeleton}
        self._dtypes |= {t.name: getattr(torch, t.dtype) for t in self.plan.tensors}
        self._skip = skip_rules(self.options.skip)
        self._outputs: dict[tuple[tuple[int, ...], torch.dtype, str | None], torch.Tensor] = {}
        self._shares: dict[tuple[tuple[int, ...], torch.dtype, str | None], int] = {}
        self._reasons: dict[str, str] = {}
        for scheme in self.candidates:
            for name, choice in self._choices(Rules((), scheme, self._skip)).items():
                if name not in self._tensors:
                    continue  # the checkpoint does not hold it
                if choice.scheme is not None and (why := self._obstacle(name, scheme)) is not None:
                    self.unstorable[scheme.name] = why, self.unstorable.get(scheme.name, ("", 0))[1] + 1
                    self._reasons.setdefault(name, why)
                elif choice.scheme is not None:
                    self.allowed.setdefault(name, []).append(scheme)
                else:
                    self._reasons.setdefault(name, choice.reason or "")

    @property
    def warnings(self) -> list[str]:
        """Candidates that are left out, for people."""
        title, format_ = self.plan.component.title, self.plan.format.name
        return [
            f"{title}: auto leaves out {name} for {plural(count, 'tensor')}: {format_} files cannot hold it ({why})"
            for name, (why, count) in self.unstorable.items()
        ]

    def _obstacle(self, name: str, scheme: Scheme) -> str | None:
        """Why the format of the files cannot hold a tensor in a scheme."""
        try:
            self.plan.format.writer.outline({name: self.output(name, scheme)})
        except WriteError as error:
            return error.message.removeprefix(f"tensor {name!r}: ")
        return None

    @property
    def component(self) -> str:
        """Its name in the pipeline."""
        return self.plan.component.name

    def _choices(self, rules: Rules) -> Mapping[str, SchemeChoice]:
        wishes = Wishes(self.options.include_embeddings, self.options.default_skips)
        return choose_schemes(self.plan.skeleton, self._dtypes, rules, wishes).tensors

    def output(self, name: str, scheme: Scheme | None) -> torch.Tensor:
        """The tensor as it would be written, on ``meta``."""
        shape = self._tensors[name].shape
        key = (shape, self._dtypes[name], scheme.key if scheme is not None else None)
        if key not in self._outputs:
            self._outputs[key] = meta_output(name, shape, self._dtypes[name], scheme)
        return self._outputs[key]

    def data_bytes(self, name: str, scheme: Scheme | None) -> int:
        """Bytes of the tensor's data."""
        return nbytes(self.output(name, scheme))

    def file_bytes(self, name: str, scheme: Scheme | None) -> int:
        """By how much the tensor makes a file longer that has such a tensor already."""
        key = (self._tensors[name].shape, self._dtypes[name], scheme.key if scheme is not None else None)
        if key not in self._shares:
            tensor = self.output(name, scheme)
            outline = self.plan.format.writer.outline
            self._shares[key] = outline({"0.0": tensor, "0.1": tensor}).size - outline({"0.0": tensor}).size
        return self._shares[key]

    def data_size(self, chosen: Mapping[str, Scheme | None]) -> int:
        """Bytes of the data of all tensors, as ``Totals.bytes_out`` counts them."""
        return sum(self.data_bytes(t.name, chosen.get(t.name)) for t in self.plan.tensors if t.action != "tied")

    def file_size(self, chosen: Mapping[str, Scheme | None]) -> int:
        """Bytes of the weights files, exact."""
        return files_size(self.plan, self.options.max_shard_size, self._written(chosen))

    def _written(self, chosen: Mapping[str, Scheme | None]) -> dict[str, torch.Tensor]:
        return {t.name: self.output(t.name, chosen.get(t.name)) for t in self.plan.tensors if t.action != "tied"}

    @cached_property
    def outside(self) -> int:
        """Parameters outside embeddings."""
        return sum(self.parameters(tensor.name) for tensor in self.plan.tensors if tensor.action != "tied")

    def parameters(self, name: str) -> int:
        """Parameters of a tensor outside embeddings; 0 of an embedding, a buffer, and what is not the model's."""
        tensor = self._tensors[name]
        counts = tensor.parameter and not tensor.embedding and tensor.action != "carry"
        return tensor.numel if counts else 0

    def quantized_fraction(self, chosen: Mapping[str, Scheme | None]) -> float:
        """As ``Totals.quantized_fraction`` counts it."""
        quantized = sum(self.parameters(name) for name, scheme in chosen.items() if scheme is not None)
        return quantized / self.outside if self.outside else 0.0

    def rules(self, chosen: Mapping[str, Scheme | None], why: str) -> Rules:
        """The choice as rules with exact names.

        Args:
            chosen: tensor → what it is quantized to.
            why: the reason of those that could have been quantized and are not.
        """
        rules: list[Rule] = []
        for name in self._tensors:
            scheme = chosen.get(name)
            if scheme is not None:
                rules.append(Rule(name, scheme, _ORIGIN))
            elif name in self.allowed:
                rules.append(Left(name, None, _ORIGIN, why))
            elif self._is_matrix(name):  # its reason would be that no rule matches it
                rules.append(Left(name, None, _ORIGIN, self._reasons[name]))
        return Rules(tuple(rules), None, self._skip)

    def _is_matrix(self, name: str) -> bool:
        spec = self._specs.get(name)
        if spec is None:  # carried over, whatever the rules
            return False
        skipped = any(rule.matches(spec.name) or rule.matches(spec.module) for rule in self._skip)
        return not skipped and spec.kind != "other" and name in self._reasons

    def refused(self, rules: Rules) -> list[str]:
        """Tensors that cannot have together what they can have alone: the experts of a mixture."""
        choices = self._choices(rules)
        return [rule.pattern for rule in rules.rules if rule.scheme is not None and not choices[rule.pattern].scheme]


def files_size(plan: ComponentPlan, limit: int | None, outputs: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the weights files that hold these tensors, as the plan will deal and predict them."""
    tensors = [
        replace(tensor, bytes_out=nbytes(outputs[tensor.name])) for tensor in plan.tensors if tensor.name in outputs
    ]
    _, _, files = lay_out(plan.component, plan.format, plan.folder, tensors, outputs, plan.order, limit)
    return sum(file.size for file in files)
