"""The machines of Hugging Face Jobs: what each has, what it costs, and which one a release needs.

The Hub is asked first (``GET /api/jobs/hardware``); where it does not answer, ``flavors.json`` has the table of
https://huggingface.co/docs/hub/jobs-pricing with the day on which it was read. Billing is by the minute.
"""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from aoconvert.errors import HubError, PlanError, UsageError
from aoconvert.humanize import size
from aoconvert.sources.hub_errors import translate_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MINUTES = {"second": 60.0, "minute": 1.0, "hour": 1 / 60}


@dataclass(frozen=True)
class Flavor:
    """A machine.

    Attributes:
        disk_bytes: that end with the job; ``None``: nobody says.
        gpu: model of the GPUs, ``None``: there are none.
        gpu_bytes: memory of one of them.
        micro_usd: price of a minute in millionths of a US dollar.
    """

    name: str
    cores: int
    memory_bytes: int
    disk_bytes: int | None
    gpu: str | None
    gpus: int
    gpu_bytes: int
    micro_usd: int

    @property
    def usd_per_hour(self) -> float:
        """Price of an hour."""
        return self.micro_usd * 60 / 1e6

    def cost(self, seconds: int, attempts: int) -> float:
        """US dollars for as many attempts of this length: every minute that is begun."""
        return -(-seconds // 60) * attempts * self.micro_usd / 1e6

    def describe(self) -> str:
        """What it has, in one line."""
        gpu = f"; {self.gpus}x {self.gpu}, {size(self.gpu_bytes)} each" if self.gpu else ""
        disk = f", {size(self.disk_bytes)} of disk" if self.disk_bytes is not None else ""
        return f"{self.cores} cores, {size(self.memory_bytes)} of memory{disk}{gpu}"


@dataclass(frozen=True)
class Prices:
    """Machines and their prices.

    Attributes:
        origin: whether the Hub said so, or the file that comes with aoconvert.
        read: the day of the file; ``None``: now.
        problem: why the Hub did not say so.
    """

    flavors: tuple[Flavor, ...]
    origin: Literal["hub", "file"]
    read: str | None
    url: str
    problem: str | None = None

    def find(self, name: str) -> Flavor:
        """The machine of this name.

        Raises:
            UsageError: there is none.
        """
        for flavor in self.flavors:
            if flavor.name == name:
                return flavor
        raise UsageError(
            f"there is no flavor {name!r}", hint=f"there are {', '.join(each.name for each in self.flavors)}"
        )


@dataclass(frozen=True)
class MachineNeeds:
    """What a release takes of a machine, in bytes; ``gpus`` of 0: no GPU is needed."""

    memory_bytes: int
    disk_bytes: int
    gpus: int
    gpu_bytes: int

    def lacks(self, flavor: Flavor) -> list[str]:
        """What a machine has too little of, one line each."""
        found = []
        if flavor.memory_bytes < self.memory_bytes:
            found.append(f"{size(flavor.memory_bytes)} of memory, {size(self.memory_bytes)} are needed")
        if flavor.disk_bytes is not None and flavor.disk_bytes < self.disk_bytes:
            found.append(f"{size(flavor.disk_bytes)} of disk, {size(self.disk_bytes)} are needed")
        if flavor.gpus < self.gpus:
            found.append("no GPU" if not flavor.gpus else f"{flavor.gpus} of {self.gpus} GPUs")
        elif self.gpus and flavor.gpu_bytes < self.gpu_bytes:
            found.append(f"{size(flavor.gpu_bytes)} on each GPU, {size(self.gpu_bytes)} are needed")
        return found

    def describe(self) -> str:
        """The needs, in one line."""
        parts = [f"{size(self.memory_bytes)} of memory", f"{size(self.disk_bytes)} of disk"]
        if self.gpus:
            parts.append(f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} with {size(self.gpu_bytes)}")
        return ", ".join(parts)


def read_prices() -> Prices:
    """The table that comes with aoconvert."""
    place = importlib.resources.files(__package__) / "flavors.json"
    values = json.loads(place.read_text(encoding="utf-8"))
    flavors = tuple(
        Flavor(
            name=entry["name"],
            cores=entry["cores"],
            memory_bytes=entry["memory_gb"] * 10**9,
            disk_bytes=entry["disk_gb"] * 10**9,
            gpu=entry.get("gpu"),
            gpus=entry.get("gpus", 0),
            gpu_bytes=entry.get("gpu_memory_gb", 0) * 10**9 // max(1, entry.get("gpus", 0)),
            micro_usd=round(entry["usd_per_hour"] * 1e6 / 60),
        )
        for entry in values["flavors"]
    )
    return Prices(flavors, "file", values["read"], values["source"])


def ask_prices(api: HfApi) -> Prices:
    """What the Hub says; the table that comes with aoconvert where it says nothing that can be used."""
    known = read_prices()
    try:
        with translate_errors("Hugging Face Jobs", None):
            listed = api.list_jobs_hardware()
    except HubError as error:
        return Prices(known.flavors, "file", known.read, known.url, error.message)
    found = tuple(flavor for flavor in (_from_hub(entry, known) for entry in listed) if flavor is not None)
    if not found:
        return Prices(known.flavors, "file", known.read, known.url, "the Hub lists no machine with a price")
    return Prices(found, "hub", None, f"{api.endpoint}/api/jobs/hardware")


def _from_hub(entry: Any, known: Prices) -> Flavor | None:
    """A machine as the Hub lists it; ``None`` where its price or its memory cannot be understood."""
    minutes, memory = _MINUTES.get(entry.unit_label), _bytes(entry.ram)
    if minutes is None or memory is None:
        return None
    disk = _bytes(entry.ephemeral_storage)
    if disk is None:
        disk = next((flavor.disk_bytes for flavor in known.flavors if flavor.name == entry.name), None)
    gpu = entry.accelerator
    gpus = _number(gpu.quantity) if gpu is not None and gpu.type == "gpu" else 0
    return Flavor(
        name=entry.name,
        cores=max(1, _number(entry.cpu)),
        memory_bytes=memory,
        disk_bytes=disk,
        gpu=gpu.model if gpus else None,
        gpus=gpus,
        gpu_bytes=(_bytes(gpu.vram) or 0) // gpus if gpus else 0,
        micro_usd=round(entry.unit_cost_micro_usd * minutes),
    )


def _number(text: Any) -> int:
    match = re.search(r"\d+", str(text))
    return int(match[0]) if match else 0


def _bytes(text: Any) -> int | None:
    """``124 GB`` in bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GT])i?B?\s*", str(text))
    return int(float(match[1]) * (10**9 if match[2] == "G" else 10**12)) if match else None


def choose_flavor(flavors: Sequence[Flavor], needs: MachineNeeds, seconds: dict[str, int]) -> Flavor:
    """The machine that is large enough and costs least for its own timeout.

    Args:
        flavors: the machines there are.
        needs: what it must have.
        seconds: name → how long it may take.

    Raises:
        PlanError: none is large enough.
    """
    fitting = [flavor for flavor in flavors if not needs.lacks(flavor)]
    if not fitting:
        raise PlanError(
            [f"no machine of Hugging Face Jobs has {needs.describe()}"], hint="--only makes fewer variants in one job"
        )
    return min(fitting, key=lambda flavor: (flavor.cost(seconds[flavor.name], 1), flavor.name))
