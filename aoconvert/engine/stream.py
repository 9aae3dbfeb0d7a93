"""One pass over a component's tensors: read once, slice by slice, for one consumer or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from aoconvert.engine.acceleration import count_bytes, open_kernels
from aoconvert.engine.block_quantizer import threads
from aoconvert.engine.channel import Stages
from aoconvert.engine.quantizer import Quantizer, open_devices
from aoconvert.engine.read_ahead import Cut, ReadAhead, Reading, Slice
from aoconvert.environment import available_cores
from aoconvert.planning.slices import common_slices
from aoconvert.planning.types import TensorPlan


class Consumer(Protocol):
    """Takes the slices of a pass.

    Attributes:
        wanted: tensor → what it makes of it, one plan for each scheme; in the order in which it takes them.
    """

    @property
    def wanted(self) -> Mapping[str, Sequence[TensorPlan]]:
        """See above."""

    def open(self, quantizer: Quantizer, stages: Stages) -> None:
        """Get ready; ``stages`` takes threads."""

    def take(self, piece: Slice) -> None:
        """Work on a slice of a tensor that is wanted, and release it."""

    def finish(self) -> None:
        """No more slices will come."""


def stream(reading: Reading, consumers: Sequence[Consumer], devices: Sequence[str], *, allow_cpu: bool) -> float:
    """Read what the consumers want, once, and give each the slices of its tensors.

    Bounded channels connect the stages, so memory does not depend on the model's size. The consumers run in the
    calling thread, which is the one that Ctrl-C reaches.

    Args:
        reading: gives the tensors.
        consumers: of the same component; those that share tensors take them in the same order.
        devices: where weights are quantized.
        allow_cpu: the CPU takes what a GPU cannot; otherwise that is an error.

    Returns:
        Seconds that the reader was at work.

    Raises:
        AoconvertError: of whichever stage failed first.
    """
    devices = open_devices(devices, allow_cpu=allow_cpu)
    plans: dict[str, list[TensorPlan]] = {}
    for consumer in consumers:
        for name, tensors in consumer.wanted.items():
            plans.setdefault(name, []).extend(tensors)
    inventory = [Cut(tensors[0], common_slices(tensors)) for tensors in plans.values()]
    to_quantize = count_bytes(tensor for tensors in plans.values() for tensor in tensors)
    with (
        ReadAhead(reading, inventory, devices) as ahead,
        torch.no_grad(),
        open_kernels(devices[0], to_quantize) as kernels,
        threads(available_cores()) as pool,
    ):
        quantizer = Quantizer(devices, kernels, allow_cpu, pool)
        for consumer in consumers:
            consumer.open(quantizer, ahead.stages)
        for piece in ahead:
            takers = [consumer for consumer in consumers if piece.name in consumer.wanted]
            piece = piece.shared(len(takers))
            for consumer in takers:
                consumer.take(piece)
            del piece
        for consumer in consumers:
            consumer.finish()
    return ahead.seconds
