"""The record of a release as it is published, ``release.json``: each variant that is on the Hub, beside each of them.

It names nothing of the machine that made it, and the same release gives the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from aoconvert.checkpoint.evaluation import GateResult
from aoconvert.checkpoint.files import file_sha256
from aoconvert.checkpoint.json_model import JsonModel, read_json_model
from aoconvert.checkpoint.manifest import MANIFEST_NAME, RELEASE_NAME
from aoconvert.json_text import CONFIG_BYTES

Bytes = Annotated[int, Field(ge=0, lt=1 << 62)]
Figure = Annotated[float, Field(allow_inf_nan=False)]


class VariantNeeds(JsonModel):
    """What is needed to use a variant."""

    loads_with: dict[str, str] = Field(default_factory=dict, description="package → versions that load it")
    devices: tuple[str, ...] = Field(default=(), description="any, cuda, cpu, …: what its packed weights are for")
    min_capability: str | None = Field(default=None, description="least compute capability of a CUDA device")
    memory_bytes: Bytes | None = Field(
        default=None, description="of all weights of the model or pipeline: what they take in memory"
    )


class ReleasedVariant(JsonModel):
    """One variant as the Hub holds it."""

    name: str
    model: str = Field(description="name of one of the release's models")
    scheme: str = Field(description="name of the scheme, or of the recipe file")
    repo_id: str | None = None
    url: str | None = None
    commit: str | None = Field(default=None, description="that holds the weights; the card and this record are younger")
    revision: str | None = Field(default=None, description="commit of the source that it was made from")
    size_bytes: Bytes | None = Field(default=None, description="of all weights files that quantize wrote")
    bits_per_weight: Figure | None = None
    quantized_fraction: Figure | None = None
    worst_sqnr_db: Figure | None = None
    verified: bool | None = None
    metrics: dict[str, dict[str, Figure]] = Field(
        default_factory=dict, description="of eval: component → figure → value; a figure that does not apply is absent"
    )
    metrics_data: str | None = Field(
        default=None, description="SHA-256 of what eval put into the models: figures of other data do not compare"
    )
    gates: tuple[GateResult, ...] = ()
    needs: VariantNeeds | None = None
    manifest_sha256: str | None = None


class ReleasedModel(JsonModel):
    """A source of the release."""

    name: str
    source: str | None = Field(default=None, description="a repo; absent for a folder")


class Release(JsonModel):
    """A release: its variants that are on the Hub, in the order of the release file."""

    schema_version: Literal[1] = 1
    name: str
    models: tuple[ReleasedModel, ...]
    variants: tuple[ReleasedVariant, ...]

    def dump(self) -> bytes:
        """Write the record as JSON text."""
        values = self.model_dump(mode="json", exclude_none=True)
        return (json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()

    def find(self, manifest_sha256: str) -> ReleasedVariant | None:
        """The variant with this manifest."""
        return next((each for each in self.variants if each.manifest_sha256 == manifest_sha256), None)


def read_release(folder: Path) -> Release:
    """Read the record in a folder, which anybody may have written.

    Raises:
        OSError: there is none (``FileNotFoundError``), or it cannot be read.
        ValueError: it is no record of a release.
    """
    return read_json_model(Release, folder / RELEASE_NAME, CONFIG_BYTES)


def release_of(folder: Path) -> tuple[Release, ReleasedVariant] | None:
    """Find the record in a folder, and the variant in it that belongs to the manifest beside it."""
    try:
        found = read_release(folder)
        own = found.find(file_sha256(folder / MANIFEST_NAME))
    except (OSError, ValueError):
        return None
    return (found, own) if own is not None else None
