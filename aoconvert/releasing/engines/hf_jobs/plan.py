"""What a job would be: machine, timeout, the most it can cost, and the request. Nothing here changes anything."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from aoconvert.environment import version_of
from aoconvert.errors import HubError, PlanError, UsageError
from aoconvert.hub.access import no_token, whoami
from aoconvert.humanize import size
from aoconvert.options.jobs import JobOptions
from aoconvert.options.release import ReleaseOptions
from aoconvert.releasing.engines.hf_jobs import order as orders
from aoconvert.releasing.engines.hf_jobs.checks import check_client, collect_files, refuse_secrets
from aoconvert.releasing.engines.hf_jobs.flavors import Flavor, Prices, ask_prices, choose_flavor
from aoconvert.releasing.engines.hf_jobs.needs import Work, is_evaluated, measure_work, plan_elsewhere
from aoconvert.releasing.engines.hf_jobs.order import Order, Pin, Wishes
from aoconvert.releasing.preflight import refuse_publishing
from aoconvert.releasing.release_file import load
from aoconvert.releasing.told import OnEvent
from aoconvert.releasing.variants import PlannedVariant, choose_variants, list_variants, plan_variants
from aoconvert.sources.hub_errors import check_token, failed_status, translate_errors
from aoconvert.sources.references import parse_repo
from aoconvert.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LABEL, SPEC_LABEL = "aoconvert-release", "aoconvert-spec"
_PINNED = ("torch", "torchao", "diffusers", "transformers")
_EXTRA_PINNED = ("torchmetrics",)
COMMAND = ("python", "-m", "aoconvert.releasing.engines.hf_jobs.in_job")
_BUCKET = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class RunningJob:
    """A job that works on the same release already; ``same``: with the same order."""

    id: str
    url: str
    same: bool


@dataclass(frozen=True)
class JobPlan:
    """A job, before it is started.

    Attributes:
        token: what the job gets as a secret; it is in no repr and no document.
        names: of the variants.
        reason: why this flavor.
        dependencies: what uv installs there: the versions that the plan was made with.
        running: a job for the same release that has not ended.
        bucket_exists: whether the bucket is there already.
    """

    token: str = field(repr=False)
    order: Order
    names: tuple[str, ...]
    namespace: str
    name: str
    flavor: Flavor
    reason: str
    work: Work
    timeout: int
    timeout_reason: str
    attempts: int
    prices: Prices
    bucket: str
    bucket_exists: bool
    dependencies: tuple[str, ...]
    running: RunningJob | None
    warnings: tuple[str, ...]

    @property
    def most_usd(self) -> float:
        """The most that it can cost."""
        return self.flavor.cost(self.timeout, self.attempts)

    @property
    def environment(self) -> dict[str, str]:
        """What the job is told; no secret is in it."""
        return {
            orders.ORDER_VARIABLE: self.order.model_dump_json(),
            orders.BUCKET_VARIABLE: orders.BUCKET_MOUNT,
            orders.SOURCES_VARIABLE: orders.SOURCES_MOUNT,
        }

    @property
    def volumes(self) -> list[dict[str, Any]]:
        """Each source's commit, read-only, and the bucket."""
        sources = [
            {
                "type": "model",
                "source": pin.repo_id,
                "revision": pin.commit,
                "mount_path": f"{orders.SOURCES_MOUNT}/{pin.place}",
                "read_only": True,
            }
            for pin in self.order.pins
        ]
        sources = [volume for at, volume in enumerate(sources) if volume not in sources[:at]]
        return [*sources, {"type": "bucket", "source": self.bucket, "mount_path": orders.BUCKET_MOUNT}]

    @property
    def labels(self) -> dict[str, str]:
        """By which a running job is found again."""
        return {LABEL: release_label(self.bucket, self.order.path), SPEC_LABEL: order_label(self.order)}

    def to_dict(self) -> dict[str, Any]:
        """Give what ``release --engine hf-jobs --json`` prints of it."""
        flavor, needs = self.flavor, self.work.needs
        return {
            "schema_version": 1,
            "engine": "hf-jobs",
            "name": self.name,
            "namespace": self.namespace,
            "variants": list(self.names),
            "flavor": {
                "name": flavor.name,
                "cores": flavor.cores,
                "memory_bytes": flavor.memory_bytes,
                "disk_bytes": flavor.disk_bytes,
                "gpu": flavor.gpu,
                "gpus": flavor.gpus,
                "gpu_bytes": flavor.gpu_bytes,
                "usd_per_hour": flavor.usd_per_hour,
                "reason": self.reason,
            },
            "needs": {
                "memory_bytes": needs.memory_bytes,
                "disk_bytes": needs.disk_bytes,
                "gpus": needs.gpus,
                "gpu_bytes": needs.gpu_bytes,
            },
            "timeout_seconds": self.timeout,
            "timeout_reason": self.timeout_reason,
            "attempts": self.attempts,
            "max_cost_usd": round(self.most_usd, 4),
            "prices": {"origin": self.prices.origin, "read": self.prices.read, "url": self.prices.url},
            "bucket": {"id": self.bucket, "exists": self.bucket_exists},
            "volumes": self.volumes,
            "dependencies": list(self.dependencies),
            "command": list(COMMAND),
            "secrets": ["HF_TOKEN"],
            "running": {"id": self.running.id, "url": self.running.url} if self.running is not None else None,
            "warnings": list(self.warnings),
        }


def plan_job(path: Path, options: ReleaseOptions, job: JobOptions, on_event: OnEvent) -> JobPlan:
    """Plan a release as a job; the Hub is only asked.

    Args:
        path: the release file.
        options: of the release.
        job: how to start it.
        on_event: is told of each variant that is planned.

    Raises:
        UsageError: an unknown flavor, a bad name, or a client that is too old.
        PlanError: what a job cannot do, or no plan can be made: every problem.
        HubError: no token, or the Hub refused; nothing could be published.
    """
    check_client(version_of("huggingface_hub"))
    if _BUCKET.fullmatch(job.bucket) is None:
        raise UsageError(f"{job.bucket!r} is not the name of a bucket", hint="--bucket NAME, or NAMESPACE/NAME")
    found = load(path)
    every = list_variants(path, found, options)
    variants = choose_variants(path, every, options.only)
    files = collect_files(path, variants, options)
    api, token, namespace = _log_in(options, job)
    refuse_secrets(files, job.requirement, token)
    prices = ask_prices(api)
    asked = prices.find(job.flavor) if job.flavor is not None else None
    if not options.skip_push:
        refuse_publishing(variants, found, replace(options, token=token))
    wanted = {each.name: plan_elsewhere(each) for each in variants}
    plan_variants(variants, options, lambda each: on_event(_planned(each)), elsewhere=True)
    work = measure_work(variants, options, wanted)
    flavor = asked or choose_flavor(
        prices.flavors, work.needs, {each.name: job.timeout or work.seconds(each) for each in prices.flavors}
    )
    order = Order(path=path.name, files=files, pins=_pins(variants), options=_wishes(options))
    _check_size(order)
    bucket = job.bucket if "/" in job.bucket else f"{namespace}/{job.bucket}"
    exists, warnings = _look_at_bucket(api, bucket)
    warnings += [f"{flavor.name} has {line}" for line in work.needs.lacks(flavor)]
    if prices.problem is not None:
        warnings.append(f"the Hub did not tell its prices: {prices.problem}")
    evaluated = any(is_evaluated(each, options) for each in variants)
    return JobPlan(
        token=token,
        order=order,
        names=tuple(each.name for each in variants),
        namespace=namespace,
        name=re.sub(r"[^A-Za-z0-9_-]", "-", f"aoconvert-{path.stem}"),
        flavor=flavor,
        reason="as asked" if asked is not None else _why(work),
        work=work,
        timeout=job.timeout or work.seconds(flavor),
        timeout_reason="as asked" if job.timeout is not None else work.describe_seconds(flavor),
        attempts=job.attempts,
        prices=prices,
        bucket=bucket,
        bucket_exists=exists,
        dependencies=pin_versions(evaluated, job.requirement),
        running=find_running(api, namespace, bucket, order),
        warnings=tuple(warnings),
    )


def _wishes(options: ReleaseOptions) -> Wishes:
    return Wishes(**{name: getattr(options, name) for name in Wishes.model_fields})


def pin_versions(evaluated: bool, requirement: str | None = None) -> tuple[str, ...]:
    """What uv installs in the job: this aoconvert, and what decides the bytes in the versions that the plan is for."""
    pinned = (*_PINNED, *(_EXTRA_PINNED if evaluated else ()))
    known = ((package, version_of(package)) for package in pinned)
    pins = [f"{package}=={Version(version).public}" for package, version in known if version is not None]
    return (requirement or f"aoconvert{'[eval]' if evaluated else ''}=={__version__}", *pins)


def release_label(bucket: str, path: str) -> str:
    """What all jobs share that write to the same folder of a bucket."""
    return hashlib.sha256(f"{bucket}\n{PurePosixPath(path).stem}".encode()).hexdigest()[:32]


def order_label(order: Order) -> str:
    """What jobs share that are told the same."""
    return hashlib.sha256(order.model_dump_json().encode()).hexdigest()[:32]


def find_running(api: HfApi, namespace: str, bucket: str, order: Order) -> RunningJob | None:
    """A job of this release that has not ended.

    Raises:
        HubError: the Hub cannot be asked.
    """
    with translate_errors("Hugging Face Jobs", None):
        listed = list(
            api.list_jobs(
                namespace=namespace,
                status=["SCHEDULING", "RUNNING"],
                labels={LABEL: release_label(bucket, order.path)},
            )
        )
    if not listed:
        return None
    first = listed[0]
    return RunningJob(first.id, first.url, (first.labels or {}).get(SPEC_LABEL) == order_label(order))


def _why(work: Work) -> str:
    because = f" ({work.gpu_reason})" if work.gpu_reason else ""
    return f"the cheapest that has {work.needs.describe()}{because}"


def _planned(each: PlannedVariant) -> dict[str, Any]:
    assert each.plan is not None
    document = each.plan.to_dict()
    totals = [component["totals"] for component in document["components"]]
    found = {"needs": document["needs"], "totals": totals, "warnings": document["warnings"]}
    return {"event": "planned", "variant": each.name, **found}


def _log_in(options: ReleaseOptions, job: JobOptions) -> tuple[HfApi, str, str]:
    """The client, its token, and the namespace that pays."""
    from huggingface_hub import HfApi, get_token, is_offline_mode

    if is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set, but a job needs the Hub", hint="unset HF_HUB_OFFLINE")
    token = options.token or get_token()
    if token is None:
        raise no_token()
    check_token(token)
    api = HfApi(token=token)
    me = whoami(api)
    user = str(me["name"])
    namespace = job.namespace or user
    names = [user, *(str(org.get("name")) for org in me.get("orgs") or [])]
    if namespace not in names:
        raise HubError(f"{user} cannot run jobs for {namespace}", hint=f"--namespace takes {', '.join(names)}")
    return api, token, namespace


def _check_size(order: Order) -> None:
    if (length := len(order.model_dump_json().encode())) > orders.MOST_BYTES:
        raise PlanError(
            [f"the release file and its recipes take {size(length)}, a job can be told {size(orders.MOST_BYTES)}"],
            hint="split the release file",
        )


def _pins(variants: Sequence[PlannedVariant]) -> tuple[Pin, ...]:
    """The commit of every source, once."""
    pins = {}
    for each in variants:
        repo_id, named = parse_repo(each.source)
        commit = each.revision
        assert commit is not None
        pins[repo_id, each.model.revision or named or "main"] = commit
    return tuple(Pin(repo_id=repo, revision=revision, commit=commit) for (repo, revision), commit in pins.items())


def _look_at_bucket(api: HfApi, bucket: str) -> tuple[bool, list[str]]:
    """Whether a bucket is there, and what is to be known of it."""
    try:
        with translate_errors(f"the bucket {bucket}", None, doing="write"):
            info = api.bucket_info(bucket)
    except HubError as error:
        if failed_status(error.__cause__) not in (401, 403, 404):
            raise
        return False, []
    return True, [] if info.private else [f"the bucket {bucket} is public: everybody can read what the job makes"]


def python_version() -> str:
    """The Python that the plan was made with, as uv takes it."""
    return ".".join(platform.python_version_tuple()[:2])
