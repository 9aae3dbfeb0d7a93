"""What a release takes of a machine, and how long it may take there: both from its plans, with wide margins."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aoconvert.errors import PlanError, UsageError
from aoconvert.humanize import plural, size
from aoconvert.options.release import ReleaseOptions
from aoconvert.releasing.engines.hf_jobs.flavors import Flavor, MachineNeeds
from aoconvert.releasing.variants import PlannedVariant

# Assumed, not measured, and low on purpose: a timeout that is too short costs an attempt, one that is too long nothing.
_SETUP_SECONDS = 1800  # image, packages (torch with its CUDA libraries), imports
_BYTES_PER_CORE = 4 * 10**6  # per second
_MOST_BYTES = 100 * 10**6  # per second, over the network
_EVALUATION_SECONDS = 3600
_STEP_SECONDS = 1800  # the timeout is a multiple of it
_LEAST_SECONDS = 3600

_LIBRARIES_BYTES = 2 * 10**9  # of memory
_PACKAGES_BYTES = 20 * 10**9  # of disk: torch with its CUDA libraries, and uv's cache of them
_MOUNT_BYTES = 10 * 10**9  # of disk: what hf-mount keeps of the files that are read
_MARGIN = 1.2


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        needs: of the machine.
        nbytes: that are read and written, in all passes.
        evaluations: variants that are evaluated.
        gpu_reason: why a GPU is needed.
    """

    needs: MachineNeeds
    nbytes: int
    evaluations: int
    gpu_reason: str | None

    def seconds(self, flavor: Flavor) -> int:
        """How long an attempt on a machine may take."""
        rate = min(_MOST_BYTES, flavor.cores * _BYTES_PER_CORE)
        seconds = _SETUP_SECONDS + self.nbytes / rate + self.evaluations * _EVALUATION_SECONDS
        return max(_LEAST_SECONDS, int(-(-seconds // _STEP_SECONDS)) * _STEP_SECONDS)

    def describe_seconds(self, flavor: Flavor) -> str:
        """How that is reckoned, in one line."""
        rate = min(_MOST_BYTES, flavor.cores * _BYTES_PER_CORE)
        parts = [
            f"{_SETUP_SECONDS // 60} minutes to set up",
            f"{size(self.nbytes)} to read and write at {size(rate)} per second",
        ]
        if self.evaluations:
            parts.append(f"an hour for each of {plural(self.evaluations, 'evaluation')}")
        return " + ".join(parts) + ", assumed low and rounded up"


def measure_work(variants: Sequence[PlannedVariant], options: ReleaseOptions, asked: Mapping[str, Asked]) -> Work:
    """What planned variants take.

    Args:
        variants: the variants, with their plans.
        options: of the release.
        asked: name → what ``plan_elsewhere`` gave.
    """
    memory = disk = nbytes = evaluations = gpus = gpu_bytes = 0
    gpu_reason = None
    for each in variants:
        assert each.plan is not None
        totals = [component.totals for component in each.plan.components]
        read, written = sum(total.bytes_in for total in totals), sum(total.bytes_out for total in totals)
        needs = each.plan.needs
        whole = needs.disk_bytes - written + read  # the original, with what is taken over unchanged
        evaluated = is_evaluated(each, options)
        passes = 2 * read + 3 * needs.disk_bytes  # quantize and verify; write, keep, publish
        passes += (4 * read if evaluated else 0) + (8 * read if asked[each.name].auto else 0)
        nbytes += passes
        disk += needs.disk_bytes
        evaluations += evaluated
        loaded = max(needs.disk_bytes, whole if evaluated else 0)  # by the library, to verify or to evaluate
        memory = max(memory, needs.host_peak_bytes, int(_MARGIN * loaded) + _LIBRARIES_BYTES)
        count, reason = _count_gpus(each, asked[each.name].device, evaluated)
        if count:
            gpus, gpu_reason = max(gpus, count), gpu_reason or f"{each.name}: {reason}"
            on_gpu = int(_MARGIN * whole) if evaluated else 0
            gpu_bytes = max(gpu_bytes, needs.device_peak_bytes, on_gpu)
    memory *= options.jobs or max(1, gpus)  # side by side
    machine = MachineNeeds(memory, disk + _PACKAGES_BYTES + _MOUNT_BYTES, gpus, gpu_bytes)
    return Work(machine, nbytes, evaluations, gpu_reason)


def is_evaluated(each: PlannedVariant, options: ReleaseOptions) -> bool:
    """Whether ``eval`` runs for a variant."""
    return bool(each.gates.evaluated) if options.evaluate is None else options.evaluate


def _count_gpus(each: PlannedVariant, device: str, evaluated: bool) -> tuple[int, str]:
    """How many GPUs a variant needs, and why."""
    if device.startswith("cuda"):
        indexes = [int(found) for found in re.findall(r"cuda:(\d+)", device)]
        return max(indexes, default=0) + 1, f"device = {device}"
    if each.options.get("layout_device") == "cuda" and (evaluated or each.gates.require_forward):
        return 1, "a layout for CUDA is run"
    return 0, ""


@dataclass(frozen=True)
class Asked:
    """What the release file asks for, where a variant is planned in another way than it will be made."""

    device: str
    auto: bool


def plan_elsewhere(each: PlannedVariant) -> Asked:
    """Let a variant be planned that another machine will make; gives what it asks for.

    The device need not be here. ``auto`` would read all weights here to choose schemes: it is planned as int8wo, and
    the job chooses.
    """
    from aoconvert.environment import choose_devices

    asked = Asked(str(each.options.get("device", "auto")), each.variant.scheme == "auto")
    if asked.auto:
        each.variant = each.variant.model_copy(update={"scheme": "int8wo"})
        for name in ("candidates", "min_sqnr", "target_bits", "target_size"):
            each.options.pop(name, None)
    try:
        choose_devices(asked.device)
    except PlanError:
        each.options["device"] = "cpu"
    except UsageError:
        pass  # what is wrong with its name is told by the plan
    return asked
