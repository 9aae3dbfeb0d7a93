"""What a job cannot do, and what goes with it: known from the release file alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from packaging.version import Version

from aoconvert.errors import PlanError, UsageError
from aoconvert.files import read_limited
from aoconvert.hub.secrets import secrets_in
from aoconvert.options.release import ReleaseOptions
from aoconvert.releasing.engines.hf_jobs.needs import is_evaluated
from aoconvert.releasing.engines.hf_jobs.order import MOST_BYTES
from aoconvert.releasing.variants import PlannedVariant
from aoconvert.sources.references import parse_repo

OLDEST_CLIENT = "2.4"
"""The first huggingface_hub whose ``run_uv_job`` knows ``attempts``."""


def check_client(version: str | None) -> None:
    """Refuse a Hub client that does not know what is asked of it.

    Raises:
        UsageError: it is too old.
    """
    if version is None or Version(version) < Version(OLDEST_CLIENT):
        raise UsageError(
            f"--engine hf-jobs needs huggingface_hub {OLDEST_CLIENT} or newer, and this is {version}",
            hint=f"pip install -U 'huggingface_hub>={OLDEST_CLIENT}'",
        )


def refuse_secrets(files: Mapping[str, str], requirement: str | None, token: str) -> None:
    """Refuse a secret in what everybody can read who may see the job.

    Args:
        files: what goes with the job, by name.
        requirement: what it installs as aoconvert.
        token: of the Hub, which goes as a secret alone.

    Raises:
        PlanError: with every place of one.
    """
    problems = [
        f"{name} line {line} holds {kind}"
        for name, text in files.items()
        for line, kind in secrets_in(text.encode(), token)
    ]
    if requirement is not None:
        problems += [f"--requirement holds {kind}" for _, kind in secrets_in(requirement.encode(), token)]
        if re.search(r"://[^/@\s]+@", requirement) and not re.search(r"://git@", requirement):
            problems.append("--requirement holds a user name or password")
    if problems:
        raise PlanError(problems, hint="the page of a job shows it: take it out")


def collect_files(path: Path, variants: Sequence[PlannedVariant], options: ReleaseOptions) -> dict[str, str]:
    """The release file and the recipes, by their places beside it.

    Raises:
        PlanError: with everything that a job cannot do.
    """
    problems, files = [], {path.name: _read(path)}
    for source in dict.fromkeys(each.source for each in variants):
        if Path(source).exists():
            problems.append(f"{source} is on this machine, where a job cannot read it: push it to the Hub first")
        else:
            parse_repo(source)
    for each in variants:
        if each.options.get("device", "").startswith("xpu"):
            problems.append(f"{each.name}: Hugging Face Jobs have no xpu")
        if each.gates.max_lpips is not None and is_evaluated(each, options):
            problems.append(f"{each.name}: the gate max_lpips needs the weights of LPIPS, which a job does not have")
        recipe = each.variant.recipe
        if recipe is None or recipe in files:
            continue
        place = PurePosixPath(recipe)
        if place.is_absolute() or ".." in place.parts:
            problems.append(f"{each.name}: {recipe} is not beside the release file: only what is there goes with a job")
        elif not (path.parent / recipe).is_file():
            problems.append(f"{each.name}: there is no recipe {recipe}")
        else:
            files[recipe] = _read(path.parent / recipe)
    if problems:
        raise PlanError(problems, hint="--engine local runs on this machine")
    return files


def _read(place: Path) -> str:
    try:
        return read_limited(place, MOST_BYTES).decode()
    except OSError as error:
        raise UsageError(f"{place}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{place.name} is not UTF-8") from error
