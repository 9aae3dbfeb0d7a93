"""Makes the variants on a Ray cluster: a task for each, on whichever machine has the memory and the GPU that it needs.

Every machine sees the release file, the sources that are folders and the output root under the same paths, and has the
same versions installed. What a killed worker had finished is in the output root: its task is run again, and goes on.
Source: Ray's documentation, "Tasks", "Resources" and "Fault tolerance".
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from aoconvert.environment import version_of, versions
from aoconvert.errors import Interrupted, PlanError, WorkerError
from aoconvert.humanize import size
from aoconvert.progress import Progress
from aoconvert.releasing.engines.hearing import Hearing, Left
from aoconvert.releasing.engines.local import accelerator_of, names_device
from aoconvert.releasing.engines.task import Message, Task, Work
from aoconvert.releasing.record import VariantRecord, failure_of
from aoconvert.releasing.steps import start_record
from aoconvert.releasing.told import OnEvent
from aoconvert.releasing.variants import PlannedVariant

_log = logging.getLogger(__name__)

_RETRIES = 3
_LOOK = 1.0  # seconds without a word after which a worker is looked at
_GRACE = 60  # seconds that workers have to end
_STORE_BYTES = 80 << 20  # Ray's smallest; no object that matters goes through it

Heard = tuple[int, Message]


def check_ray(variants: Sequence[PlannedVariant]) -> None:
    """Refuse what Ray cannot make.

    Raises:
        PlanError: with every problem.
    """
    if version_of("ray") is None:
        raise PlanError(["--engine ray: Ray is not installed"], hint="pip install 'aoconvert[ray]'")
    named = [each for each in variants if names_device(each)]
    if named:
        problems = [f"{each.name}: device {each.options['device']}: Ray chooses which GPU a task has" for each in named]
        raise PlanError(problems, hint='device = "cuda", or "auto"')


def make_on_ray(
    variants: Sequence[PlannedVariant], work: Work, progress: Progress, on_event: OnEvent
) -> Generator[VariantRecord]:
    """Make planned variants, each in a task of its own; each record comes as soon as its variant is judged.

    A task whose worker dies is run again, a few times, and goes on with what is finished. When the iterator is closed,
    the tasks are cancelled.

    Raises:
        PlanError: no cluster answers.
        Interrupted: what is done stays for the next run.
    """
    hearing = Hearing(progress, on_event)
    records = {each.name: start_record(each) for each in variants}
    try:
        with _connected(work.options.address, work.options.jobs) as ray:
            tasks = _Tasks(ray, [(each, _absolute(work).task([each])) for each in variants], work.options.jobs)
            with contextlib.closing(tasks):
                for worker, message in tasks.listen(records):
                    if (record := hearing.hear(worker, message)) is not None:
                        hearing.forget(worker)
                        hearing.pause()
                        yield record
    except KeyboardInterrupt:
        raise Interrupted("interrupted; what is finished is kept, run the same command again to continue") from None
    finally:
        hearing.pause()


def _absolute(work: Work) -> Work:
    """A release whose paths do not depend on the current folder."""
    options, cache = work.options, work.options.cache_dir
    found = replace(options, output_root=options.output_root.absolute(), cache_dir=cache.absolute() if cache else None)
    return Work(work.path.absolute(), work.found, found)


@contextlib.contextmanager
def _connected(address: str | None, jobs: int | None) -> Iterator[Any]:
    """Ray, connected to a cluster: the caller's, one at an address, or a new one on this machine.

    Raises:
        PlanError: it cannot be reached, or not be started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = importlib.import_module("ray")
    if ray.is_initialized():
        yield ray
        return
    found = address or os.environ.get("RAY_ADDRESS")
    own = {} if found else {"include_dashboard": False, "object_store_memory": _STORE_BYTES, "num_cpus": jobs}
    try:
        ray.init(address=found or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise PlanError(
            [f"Ray at {found or 'this machine'}: {said}"], hint="check --address and the cluster"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _carry_out(task: str, queue: Any, number: int, expected: Mapping[str, str]) -> int:
    """Run in a Ray worker: carry out a task, and say as it goes what is done."""
    from aoconvert.releasing.engines.worker import run_task

    def say(message: Message) -> None:
        queue.put((number, message))

    say({"began": os.getpid()})
    here = versions()
    if here != expected:
        names = [name for name in {**here, **expected} if here.get(name) != expected.get(name)]
        other = ", ".join(f"{name} {here.get(name, 'none')} and not {expected.get(name, 'none')}" for name in names)
        hint = "install the same versions on all machines"
        say({"failure": failure_of(WorkerError(f"a machine of the cluster has {other}", hint=hint)).model_dump()})
        return 1
    code = run_task(Task.model_validate_json(task), say)
    say({"ended": code})
    return code


class _Tasks:
    """Tasks in a cluster; not more at a time than asked for.

    Args:
        ray: the module, connected.
        tasks: each with its variant.
        most: at a time.
    """

    def __init__(self, ray: Any, tasks: Sequence[tuple[PlannedVariant, Task]], most: int | None) -> None:
        self._ray = ray
        self._waiting = list(enumerate(tasks))[::-1]
        self._most = most or len(tasks)
        self._running: dict[int, Any] = {}
        self._left: dict[int, Left] = {}
        self._begun: set[int] = set()
        self._queue = importlib.import_module("ray.util.queue").Queue(actor_options={"num_cpus": 0})
        self._remote = ray.remote(_carry_out)

    def listen(self, records: Mapping[str, VariantRecord]) -> Generator[Heard]:
        """Start; gives what the workers say until all tasks are done, and what became of those that died."""
        while self._waiting or self._running:
            while self._waiting and len(self._running) < self._most:
                self._start(*self._waiting.pop())
            heard = self._take(_LOOK)
            if heard is not None:
                yield from self._hear(*heard)
            ending = heard is not None and not heard[1].keys().isdisjoint(("ended", "failure"))
            if heard is None or ending:
                for number in self._done(_LOOK if ending else 0):
                    while (late := self._take(0)) is not None:
                        yield from self._hear(*late)
                    yield from self._end(number, records)

    def close(self) -> None:
        """Cancel the tasks that run, which keep what is finished."""
        running = list(self._running.values())
        for task in running:
            with contextlib.suppress(Exception):  # the cluster may be gone
                self._ray.cancel(task)
        with contextlib.suppress(Exception):
            self._ray.wait(running, num_returns=len(running), timeout=_GRACE)
        with contextlib.suppress(Exception):
            self._queue.shutdown(force=True)

    def _start(self, number: int, item: tuple[PlannedVariant, Task]) -> None:
        each, task = item
        assert each.plan is not None
        needs: dict[str, Any] = {"memory": each.plan.needs.host_peak_bytes, "num_cpus": 1}
        if accelerator_of([each]) is not None:
            needs["num_gpus"] = 1
        self._warn_of_waiting(each, needs)
        started = self._remote.options(name=f"aoconvert {each.name}", max_retries=_RETRIES, **needs)
        self._left[number] = Left(list(task.names))
        self._running[number] = started.remote(task.model_dump_json(), self._queue, number, versions())

    def _warn_of_waiting(self, each: PlannedVariant, needs: Mapping[str, Any]) -> None:
        """Say so where no machine that is there now is large enough; the cluster may grow."""
        names = {"memory": "memory", "num_gpus": "GPU"}
        machines = [machine["Resources"] for machine in self._ray.nodes() if machine["Alive"]]
        for key, resource in names.items():
            if key in needs and all(machine.get(resource, 0) < needs[key] for machine in machines):
                wanted = size(needs[key]) + " of memory" if key == "memory" else "a GPU"
                _log.warning("%s waits: no machine of the cluster has %s", each.name, wanted)

    def _take(self, seconds: float) -> Heard | None:
        """What a worker says next; ``None`` where none says anything for so long."""
        empty = importlib.import_module("ray.util.queue").Empty
        with contextlib.suppress(empty):
            number, message = self._queue.get(block=seconds > 0, timeout=seconds or None)
            return int(number), message
        return None

    def _hear(self, number: int, message: Message) -> Iterator[Heard]:
        left = self._left[number]
        if "began" in message:
            if number in self._begun:
                _log.warning("%s: its worker died; another goes on", ", ".join(left.names))
            self._begun.add(number)
        elif left.hear(message):
            yield number, message

    def _done(self, seconds: float) -> list[int]:
        """Tasks that are over, for good or bad; waits so long for the first."""
        numbers = {task: number for number, task in self._running.items()}
        over, _ = self._ray.wait(list(numbers), timeout=seconds) if numbers else ([], [])
        return [numbers[task] for task in over]

    def _end(self, number: int, records: Mapping[str, VariantRecord]) -> Iterator[Heard]:
        task, error = self._running.pop(number), None
        try:
            self._ray.get(task)
        except self._ray.exceptions.RayError as failed:
            said = next(iter(str(failed).splitlines()), "")
            hint = "run the same command again: what is finished is kept"
            error = WorkerError(f"its worker died {1 + _RETRIES} times: {type(failed).__name__}: {said}", hint=hint)
        for message in self._left[number].give_up(error or WorkerError("its worker stopped"), records):
            yield number, message
