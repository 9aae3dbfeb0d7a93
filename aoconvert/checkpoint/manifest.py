"""The manifest, ``aoconvert.json``: the contract between the one who quantized and everyone who comes after.

The JSON Schema in ``manifests/manifest.v1.schema.json`` is generated from these models
(``python -m aoconvert.checkpoint.manifest``). Unknown keys are kept on reading, so that a newer writer does not
break an older reader.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal
from weakref import WeakValueDictionary

from pydantic import AfterValidator, Field, ValidationError

from aoconvert.checkpoint.entries import Entry, RelativePath, inside
from aoconvert.checkpoint.entries import Sha256 as Sha256
from aoconvert.checkpoint.entries import StoredEntry as StoredEntry
from aoconvert.checkpoint.entries import TensorEntry as TensorEntry
from aoconvert.checkpoint.json_model import JsonModel
from aoconvert.checkpoint.manifest_text import parse
from aoconvert.errors import CHECK_PERMISSIONS, SourceError
from aoconvert.files import read_limited
from aoconvert.sources.weights import Format

MANIFEST_NAME = "aoconvert.json"
REPORT_NAME = "aoconvert.verify.json"
BENCH_NAME = "aoconvert.bench.json"
EVAL_NAME = "aoconvert.eval.json"
SHEET_NAME = "eval.png"
CARD_BYTES = 8 << 20
CARD_NAME = "README.md"
PICTURE_NAME = "sqnr.svg"
RELEASE_NAME = "release.json"
SIBLINGS_NAME = "release.svg"
OWN_NAMES = frozenset(
    {MANIFEST_NAME, REPORT_NAME, BENCH_NAME, EVAL_NAME, SHEET_NAME, PICTURE_NAME, RELEASE_NAME, SIBLINGS_NAME}
)
"""What is made beside the files that a manifest lists, but for the card."""
SCHEMA_VERSION = 1
PLAIN = "plain"
"""What stands for a scheme where nothing is quantized."""
MOST_BYTES = 512 << 20  # a manifest of 300,000 tensors has some 200 MB
_BLANK = "0" * 64
_DIGEST_KEY = '"digest": "'
SCHEMA_PATH = Path("manifests") / "manifest.v1.schema.json"


def _folder(path: str) -> str:
    return path and inside(path)


RelativeFolder = Annotated[str, AfterValidator(_folder), Field(description="its folder, '' for the root")]


class Tool(JsonModel):
    """Who wrote the manifest."""

    name: str
    version: str


class FileEntry(JsonModel):
    """A file: size in bytes and SHA-256 of its content."""

    path: RelativePath
    size: int = Field(ge=0)
    sha256: Sha256


class SourceCard(JsonModel):
    """What the source's model card (the front matter of its README.md) says and a card of the result takes over.

    Keys: https://huggingface.co/docs/hub/model-cards#model-card-metadata.
    """

    license: str | None = Field(default=None, description="as the card has it; entries of a list are joined by ', '")
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] = Field(default_factory=list)
    pipeline_tag: str | None = None
    library_name: str | None = None
    tags: list[str] = Field(default_factory=list)
    prior: list[str] = Field(
        default_factory=list, description="repos that diffusers opens together with a pipeline that names them"
    )


class ConfigEntry(JsonModel):
    """Where the config of a single file came from: a repo at a commit, or a folder."""

    repo_id: str | None = None
    revision: str | None = Field(default=None, description="commit hash")
    folder: str = Field(default="", description="in the repo or folder")
    inferred: bool = Field(default=False, description="it was not named: diffusers takes it for this layout")


class LoraEntry(JsonModel):
    """A LoRA that was added to the weights before they were quantized, in float32; a file by its SHA-256."""

    label: str
    repo_id: str | None = None
    revision: str | None = Field(default=None, description="commit hash")
    path: RelativePath = Field(description="its weights file: in the repo, or its name")
    weight: float = Field(description="the factor that the user gave")
    size: int = Field(ge=0)
    sha256: Sha256
    tensors: int = Field(description="how many tensors it changed")


class SourceEntry(JsonModel):
    """What was quantized. ``files`` are the weights files that were read."""

    kind: Literal["hub", "folder", "file"]
    repo_id: str | None = None
    revision: str | None = Field(default=None, description="commit hash")
    subfolder: str | None = None
    license: str | None = None
    base_model: str | None = None
    card: SourceCard | None = None
    config: ConfigEntry | None = Field(default=None, description="of a single file")
    loras: list[LoraEntry] = Field(default_factory=list, description="that were added, in this order")
    files: list[FileEntry]


class DeviceEntry(JsonModel):
    """The device that quantized."""

    type: str
    name: str
    capability: list[int] | None = None


class EnvironmentEntry(JsonModel):
    """Versions of everything that has a say in the bytes that were written."""

    python: str
    torch: str
    torchao: str
    diffusers: str
    transformers: str
    accelerate: str
    huggingface_hub: str
    aoconvert: str
    platform: str
    device: DeviceEntry


class LayoutEntry(JsonModel):
    """Where the packed layout can be used: ``any`` for plain ones.

    ``unconfirmed``: why nobody can be sure yet that the packed bytes are those of that device.
    """

    device: Literal["any", "cpu", "cuda", "xpu"]
    packing: str
    min_capability: list[int] | None = None
    requires: list[str] = Field(default_factory=list, description="package>=version")
    unconfirmed: str | None = None


class LoadEntry(JsonModel):
    """How the component is opened: ``class_name.from_pretrained(folder, **kwargs)``, or by assignment."""

    strategy: Literal["from_pretrained", "assign"]
    class_name: str
    kwargs: dict[str, Any] = Field(default_factory=dict)


class LeftOutEntry(JsonModel):
    """A tensor that was not written, and why."""

    name: str
    reason: str


class OriginalEntry(JsonModel):
    """How the source was quantized. ``dtype`` is what its config says that the model runs in."""

    method: str = Field(description="quant_method of the source's config")
    how: str = Field(description="what its files hold, in words")
    dequantized_by: str = Field(description="the package whose code gave the values back, and its version")
    dtype: str
    tensors: int = Field(description="how many of its tensors were quantized")
    carried: int = Field(default=0, description="how many of these keep their codes and scales, bit for bit (--carry)")


class DeviationEntry(JsonModel):
    """A tensor of an old checkpoint that is not what it was, or with which something else is computed, and why.

    ``max_abs_error`` is the largest difference of its values to those that the old checkpoint stands for; 0 where there
    is none.
    """

    name: str
    reason: str
    max_abs_error: float


class MigratedEntry(JsonModel):
    """Where the tensors of a migrated component are from."""

    kind: Literal["torchao", "quanto"] = Field(description="who wrote the old checkpoint")
    scheme: str | None = Field(description="what it was quantized to, as inspect says it")
    written_by: str | None = Field(default=None, description="the release that wrote it, or the releases that can have")
    deviations: list[DeviationEntry] = Field(default_factory=list)


class ConvertedEntry(JsonModel):
    """Where the tensors of a component are from that somebody else had quantized, and ``convert`` wrote again."""

    kind: Literal["torchao"] = Field(description="who quantized it")
    format: Format = Field(description="of the weights files that it was in")
    written_by: str | None = Field(default=None, description="the torchao releases that can have written a .bin")


class Totals(JsonModel):
    """Sums over a component. ``quantized_fraction`` is of the parameters outside embeddings."""

    tensors: int
    parameters: int
    quantized_parameters: int
    quantized_fraction: float
    bytes_in: int
    bytes_out: int
    bits_per_weight: float
    worst_sqnr_db: float | None = None


class ComponentEntry(JsonModel):
    """One quantized model, or with the library ``torch`` one file of tensors that nothing says the model of."""

    name: str
    path: RelativeFolder
    library: Literal["diffusers", "transformers", "torch"]
    class_name: str
    module: str | None = Field(
        default=None,
        description="where the class of a pipeline-specific part is: a module of diffusers.pipelines, "
        "or code inside the checkpoint",
    )
    scheme: str = Field(description="several are joined by '+'; 'plain' where a migration left nothing quantized")
    config: dict[str, Any] = Field(description="torchao.core.config.config_to_dict; empty where nothing is quantized")
    dtype: str = Field(description="dtype of unquantized tensors, and the dtype that quantized ones dequantize to")
    layout: LayoutEntry
    format: Format
    files: list[FileEntry]
    safe_globals: list[str] = Field(description="names in the pickles beyond torch's own")
    imports: list[str] = Field(description="modules to import before loading")
    load: LoadEntry
    loads_with: dict[str, str]
    fused_qkv: bool = Field(default=False, description="query, key and value projections were fused first")
    rules: dict[str, str | None] | None = Field(
        default=None, description="with several schemes: pattern of the FqnToConfig → scheme, null where it is skipped"
    )
    original: OriginalEntry | None = Field(
        default=None, description="how the source was quantized already; absent where it was not"
    )
    migrated: MigratedEntry | None = Field(
        default=None,
        description="with migrate: the old checkpoint that the component was; absent otherwise",
    )
    converted: ConvertedEntry | None = Field(
        default=None,
        description="with convert: the checkpoint by somebody else that the component was; absent otherwise",
    )
    missing: list[LeftOutEntry] = Field(
        default_factory=list,
        description="tensors of the model that its source does not hold: the library initializes them",
    )
    dropped: list[LeftOutEntry] = Field(
        default_factory=list, description="tensors that the source's weights files hold and the result does not"
    )
    tensors: list[TensorEntry]
    totals: Totals


class UnquantizedEntry(JsonModel):
    """A part of a pipeline that was not quantized; its tensors are the source's, bit for bit."""

    name: str
    path: RelativeFolder
    library: Literal["diffusers", "transformers"] = Field(description="how its weights are loaded")
    class_name: str
    files: list[FileEntry]
    tensors: list[StoredEntry]


class LeftBehindEntry(JsonModel):
    """A file or folder of the source that did not arrive, and why."""

    path: str
    reason: str


class RunEntry(JsonModel):
    """The only part that differs between two equal runs. Times in seconds, peaks in bytes.

    ``digest`` is the SHA-256 of the whole file's text with this one value written as 64 zeros: it shows damage and
    careless edits. It proves nothing about who wrote the file.
    """

    command: str
    started: str
    seconds: float
    peak_host_bytes: int
    peak_device_bytes: int
    reader_seconds: float
    quantize_seconds: float
    writer_seconds: float
    digest: Sha256 | None = None


class PipelineEntry(JsonModel):
    """The pipeline's class, and what its ``__call__`` takes: parameter → default (null where it is no plain value).

    A model card shows an example of use by it, without importing the pipeline.
    """

    class_name: str
    call: dict[str, bool | int | float | str | None]


class Manifest(JsonModel):
    """``aoconvert.json``."""

    schema_version: Literal[1]
    tool: Tool
    source: SourceEntry
    environment: EnvironmentEntry
    pipeline: PipelineEntry | None = None
    components: list[ComponentEntry]
    unquantized: list[UnquantizedEntry] = Field(default_factory=list)
    copied: list[FileEntry]
    left_behind: list[LeftBehindEntry] = Field(default_factory=list)
    run: RunEntry

    def files(self) -> Iterator[FileEntry]:
        """Every file that the manifest vouches for."""
        for component in self.components:
            yield from component.files
        for part in self.unquantized:
            yield from part.files
        yield from self.copied

    def weights_by_folder(self) -> dict[str, tuple[str, ...]]:
        """Folder of each model → the weights files that were written for it."""
        models: list[ComponentEntry | UnquantizedEntry] = [*self.components, *self.unquantized]
        return {
            model.path: tuple(file.path for file in model.files if not file.path.endswith(".json")) for model in models
        }


def encode(manifest: Manifest) -> bytearray:
    """The manifest as JSON text (UTF-8) with its digest, the same for the same values."""
    run = manifest.run.model_copy(update={"digest": _BLANK})
    encoder = json.JSONEncoder(indent=1, ensure_ascii=False, allow_nan=False, default=_members)
    chunks = encoder.iterencode(manifest.model_copy(update={"run": run}))
    raw = bytearray()
    while batch := "".join(islice(chunks, 1 << 14)):  # no list of all: a few characters each, they are millions
        raw += batch.encode()
    raw += b"\n"
    digest = hashlib.sha256(raw).hexdigest()
    at = raw.rindex(f"{_DIGEST_KEY}{_BLANK}".encode()) + len(_DIGEST_KEY)
    raw[at : at + len(digest)] = digest.encode()
    return raw


def dump(manifest: Manifest) -> str:
    """The text that ``encode`` gives."""
    return encode(manifest).decode()


# keys that are left out where there is nothing to say; the others of a model are always there
_ONLY_IF_SET = frozenset({"original", "migrated", "converted"})


def _members(value: Any) -> dict[str, Any]:
    """One level of what JSON does not know: an entry or a model, with the keys that nobody here knows."""
    if isinstance(value, Entry):
        return value.to_dict()
    return {key: item for key, item in dict(value).items() if item is not None or key not in _ONLY_IF_SET}


# by the SHA-256 of their text, as long as somebody uses them: push and card read the same one
_LOADED: WeakValueDictionary[str, Manifest] = WeakValueDictionary()


def _is_whole(raw: bytes, run: RunEntry) -> bool:
    """Whether the text is as it was written; one without a digest cannot be told.

    Whoever writes keys that this version does not know writes a digest, too: without one, such a key is its name,
    damaged.
    """
    if run.digest is None:
        return "digest" in run.model_fields_set or not run.model_extra
    return _digest_is_right(raw, run.digest)


def _digest_is_right(raw: bytes, digest: str) -> bool:
    """Whether the text hashes to its digest, with zeros in the digest's place; no copy of it is made."""
    at = raw.rfind(f"{_DIGEST_KEY}{digest}".encode())
    if at < 0:
        return False
    at += len(_DIGEST_KEY)
    found = hashlib.sha256()
    for part in (memoryview(raw)[:at], _BLANK.encode(), memoryview(raw)[at + len(digest) :]):
        found.update(part)
    return found.hexdigest() == digest


def _validate(values: Any, path: Path) -> Manifest:
    """What ``parse`` gave, as a manifest.

    Raises:
        SourceError: it is not valid, or of a newer schema.
    """
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise SourceError(
            f"{path} has schema_version {version!r}; this aoconvert reads {SCHEMA_VERSION}", hint="upgrade aoconvert"
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SourceError(f"{path} is not a valid manifest: {where}: {first['msg']}") from error


def read(folder: Path) -> bytes:
    """The manifest as it is in a folder.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    return read_limited(folder / MANIFEST_NAME, MOST_BYTES)


def load(folder: Path) -> Manifest:
    """Read and check the manifest of a folder.

    Raises:
        SourceError: there is none, it is not valid, or it is of a newer schema.
    """
    path = folder / MANIFEST_NAME
    try:
        raw = read(folder)
    except (FileNotFoundError, NotADirectoryError):
        if not folder.is_dir():
            what = f"{folder} is not a folder" if folder.exists() else f"no such folder: {folder}"
            raise SourceError(what, hint="give the output folder of aoconvert quantize") from None
        raise SourceError(
            f"{folder} has no {MANIFEST_NAME}", hint="was this folder written by aoconvert quantize?"
        ) from None
    except OSError as error:
        hint = CHECK_PERMISSIONS if isinstance(error, PermissionError) else "make the checkpoint again"
        raise SourceError(f"{path} cannot be read: {error.strerror or ''}", hint=hint) from error
    digest = hashlib.sha256(raw).hexdigest()
    if (known := _LOADED.get(digest)) is not None:
        return known
    try:
        values = parse(raw)
    except ValueError as error:
        raise SourceError(f"{path} cannot be read: {error}", hint="make the checkpoint again") from error
    found = _validate(values, path)
    if not _is_whole(raw, found.run):
        raise SourceError(f"{path} was edited or damaged: its digest does not match", hint="make the checkpoint again")
    _LOADED[digest] = found
    return found


def json_schema() -> str:
    """The JSON Schema text that ``manifests/`` holds."""
    schema = Manifest.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = f"aoconvert manifest, version {SCHEMA_VERSION}"
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_PATH.write_text(json_schema(), encoding="utf-8")
