"""Makes the variants on this machine: in this process, or in several workers, one for each device."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing

from aoconvert import accelerators
from aoconvert.environment import ACCELERATORS
from aoconvert.errors import Interrupted, PlanError
from aoconvert.humanize import size
from aoconvert.memory import available_bytes
from aoconvert.progress import Progress
from aoconvert.releasing.engines.crew import Crew, Place
from aoconvert.releasing.engines.hearing import Hearing
from aoconvert.releasing.engines.task import Work, deal, group_by_source
from aoconvert.releasing.record import VariantRecord
from aoconvert.releasing.steps import Steps, start_record
from aoconvert.releasing.told import OnEvent
from aoconvert.releasing.variants import PlannedVariant

_log = logging.getLogger(__name__)


def make_here(variants: Sequence[PlannedVariant], steps: Steps) -> Iterator[VariantRecord]:
    """Make planned variants in this process, one source after the other.

    Each record comes as soon as its variant is judged.

    Raises:
        Interrupted: what is done stays for the next run.
    """
    for group in group_by_source(variants):
        yield from steps.make(group)


def make_in_workers(
    variants: Sequence[PlannedVariant], work: Work, jobs: int, progress: Progress, on_event: OnEvent
) -> Iterator[VariantRecord]:
    """Make planned variants in so many workers at a time; each record comes as soon as its variant is judged.

    A worker that dies is a failure of the variant that it was at. When the iterator is closed, the workers stop.

    Raises:
        Interrupted: what is done stays for the next run.
    """
    own = [each for each in variants if names_device(each)]  # they see every GPU, and choose one themselves
    others = [each for each in variants if not names_device(each)]
    tasks = [work.task(group) for group in (*deal(others, jobs - bool(own)), *deal(own, jobs - bool(others)))]
    crew = Crew(tasks, places(jobs, accelerator_of(others)), {each.name: start_record(each) for each in variants})
    hearing = Hearing(progress, on_event)
    try:
        with closing(crew.listen()) as messages:
            for worker, message in messages:
                if message is None:
                    hearing.forget(worker)
                elif (record := hearing.hear(worker, message)) is not None:
                    hearing.pause()
                    yield record
    except KeyboardInterrupt:
        raise Interrupted("interrupted; what is finished is kept, run the same command again to continue") from None
    finally:
        hearing.pause()
        crew.stop()


def choose_jobs(variants: Sequence[PlannedVariant], jobs: int | None) -> int:
    """How many workers make planned variants at a time: as many as was asked for, or one for each GPU.

    Raises:
        PlanError: so many as were asked for need more memory than this machine has now.
    """
    kind = accelerator_of(variants)
    wanted = jobs if jobs is not None else (accelerators.count(kind) if kind is not None else 1)
    wanted = max(1, min(wanted, len(variants)))
    if wanted == 1:
        return 1
    peaks = sorted(each.plan.needs.host_peak_bytes for each in variants if each.plan and not each.is_made)[::-1]
    left = available_bytes()
    fit = next((count for count in range(wanted, 1, -1) if sum(peaks[:count]) <= left), 1)
    if fit == wanted:
        return wanted
    lacking = (
        f"{wanted} workers need up to {size(sum(peaks[:wanted]))} of memory, and this machine has {size(left)} left"
    )
    if jobs is not None:
        raise PlanError([f"--jobs {jobs}: {lacking}"], hint=f"--jobs {fit}, or close other programs")
    _log.warning("%s: --jobs %s is used", lacking, fit)
    return fit


def names_device(each: PlannedVariant) -> bool:
    """Whether a release file says by number which GPUs make a variant."""
    return ":" in (each.options.get("device") or "")


def accelerator_of(variants: Sequence[PlannedVariant]) -> str | None:
    """The kind of GPU that variants are made on which do not name one by its number."""
    kinds = {each.plan.device.partition(":")[0] for each in variants if each.plan and not names_device(each)}
    return next((kind for kind in ACCELERATORS if kind in kinds), None)


def places(jobs: int, kind: str | None) -> list[Place]:
    """Share out the processors, and the GPUs of a kind, among workers."""
    gpus = accelerators.count(kind) if kind is not None else 0
    shares = _share_cores(jobs)
    return [
        Place(cores, accelerators.show_one(kind, number % gpus) if kind is not None and gpus else {})
        for number, cores in enumerate(shares)
    ]


def _share_cores(jobs: int) -> list[tuple[int, ...]]:
    """Processors of each of so many workers; one, where there are more workers than that."""
    try:
        cores = sorted(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux: nobody can keep them apart
        return [()] * jobs
    if jobs >= len(cores):
        return [(cores[number % len(cores)],) for number in range(jobs)]
    return [tuple(cores[number * len(cores) // jobs : (number + 1) * len(cores) // jobs]) for number in range(jobs)]
