"""The journal of an unfinished run: which tensors its files hold already, and what they were made from.

One line of JSON for the run's signature, then one for each finished tensor and each sealed file. Every line ends with
the SHA-256 of itself and of all lines before it, so that a torn, edited or missing line is the journal's end. What the
lines say is checked against the plan and the files before it is used (``aoconvert.engine.resume``).

Lines are not flushed to the disk one by one: a killed process loses nothing, and after a power cut the digests tell how
much is left.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from aoconvert.checkpoint.manifest import Sha256
from aoconvert.environment import device_facts, versions
from aoconvert.files import read_limited, writing
from aoconvert.formats.registry import SAFETENSORS
from aoconvert.formats.safetensors.header import header_of
from aoconvert.planning.types import ComponentPlan

if TYPE_CHECKING:
    from aoconvert.planning import Plan
    from aoconvert.sources import Source

_FORMAT = 2
_CHAIN = ', "chain": "'
_PACKAGES = ("aoconvert", "torch", "torchao", "diffusers", "transformers")
_VERSION = re.compile(r"[\w.+!-]{1,40}")
_MOST_BYTES = 1 << 30  # no journal is larger


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MarkLine(_Line):
    """What was read from a source file, see ``formats.digest.Mark``."""

    position: int = Field(ge=0)
    sha256: Sha256


class TensorLine(_Line):
    """A finished tensor, see ``formats.base.StoredTensor``; ``prefix`` is the digest of the file up to its end."""

    kind: Literal["tensor"] = "tensor"
    file: str
    name: str
    class_name: str
    data_names: list[str]
    nbytes: int = Field(ge=0)
    sha256: Sha256
    resume_state: Any
    size: int = Field(ge=0)
    prefix: Sha256
    sqnr_db: float | None
    max_abs_error: float | None
    repaired: int = Field(ge=0)
    device: str | None = Field(default=None, pattern="^(cpu|cuda|xpu)$")
    source: dict[str, MarkLine]


class FileLine(_Line):
    """A sealed file."""

    kind: Literal["file"] = "file"
    file: str
    size: int = Field(ge=0)
    sha256: Sha256


Line = TensorLine | FileLine
_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


class JournalFile:
    """Writes a journal, beginning with ``signature``; an earlier one is replaced.

    Raises:
        WriteError: disk full, or no permission.
    """

    def __init__(self, path: Path, signature: Mapping[str, Any], lines: list[Line]) -> None:
        self._path = path
        self._chain = ""
        partial = path.with_name(path.name + ".new")
        with writing(path):
            partial.unlink(missing_ok=True)
            self._descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                self._append({"format": _FORMAT, "signature": signature})
                for line in lines:
                    self._append(line.model_dump())
                partial.replace(path)
            except BaseException:
                self.close()
                raise

    def append(self, line: Line) -> None:
        """Add a line.

        Raises:
            WriteError: disk full.
        """
        with writing(self._path):
            self._append(line.model_dump())

    def close(self) -> None:
        """Release the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, values: Mapping[str, Any]) -> None:
        text = json.dumps(values)
        self._chain = _next(self._chain, text)
        view = memoryview(f'{text[:-1]}{_CHAIN}{self._chain}"}}\n'.encode())
        while view.nbytes:
            view = view[os.write(self._descriptor, view) :]


def _next(chain: str, text: str) -> str:
    return hashlib.sha256((chain + text).encode("utf-8", "surrogatepass")).hexdigest()


def read_journal(path: Path) -> tuple[Mapping[str, Any], list[Line]] | None:
    """The signature and the lines of a journal, as far as they are sound.

    Returns:
        ``None`` where there is no journal, or none whose first line can be used.
    """
    try:
        raw = read_limited(path, _MOST_BYTES, follow=False)
        texts = raw.split(b"\n")[:-1]  # behind the last line break lies nothing, or a torn line
    except OSError:
        return None
    signature: Mapping[str, Any] | None = None
    lines: list[Line] = []
    chain = ""
    try:
        for raw in texts:
            body, _, seal = raw.decode("utf-8").rpartition(_CHAIN)
            text, chain = body + "}", _next(chain, body + "}")
            if seal != f'{chain}"}}':
                break
            values = json.loads(text)
            if signature is None:
                if values["format"] != _FORMAT or not isinstance(values["signature"], dict):
                    return None
                signature = values["signature"]
            else:
                lines.append(_LINE.validate_python(values))
    except (ValueError, LookupError, TypeError, RecursionError, ValidationError):
        pass  # somebody else's line: what came before it counts
    return None if signature is None else (signature, lines)


def signature_of(plan: Plan, *, by_commit: bool = False, known: dict[str, list[Any]] | None = None) -> dict[str, Any]:
    """What the files of a run depend on: another signature is another result.

    Args:
        plan: the plan.
        by_commit: of a repo on the Hub the commit is looked at in place of its files here: they need not have been
            fetched, and another machine finds the same.
        known: what was found of this source's files for plans that were made with this one, by path; more is added.
            Their headers are those that the plans were made from: they are not read again.

    Raises:
        OSError: a file of the source is gone.
    """
    commit = plan.source.revision if by_commit else None
    again = known is None
    known = {} if known is None else known
    paths = [path for model in plan.streamed for path in (model.weights.paths if model.weights else ())]
    for path in paths:
        if path not in known:
            here = [path, plan.source.files()[path].size, commit]
            known[path] = here if commit is not None else _file_facts(plan.source, path, again=again)
    device = device_facts(plan.device)
    installed = versions()
    return {
        "versions": {name: installed.get(name) for name in _PACKAGES},
        "device": device.type if device.type == "cpu" else f"{device.type} {device.name}",
        "plan": _digest([*_plan_values(plan), *([lora.sha256, lora.weight] for lora in plan.loras), *plan.told]),
        "source": _digest([known[path] for path in paths]),
    }


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _plan_values(plan: Plan) -> list[Any]:
    return [
        [
            model.component.name,
            model.component.class_name,
            model.folder,
            model.dtype if isinstance(model, ComponentPlan) else None,
            [
                [
                    t.name,
                    t.shape,
                    t.source_dtype,
                    t.dtype,
                    t.action,
                    t.file,
                    t.origin,
                    t.bytes_out,
                    t.scheme.key if t.scheme is not None else None,
                    t.same_as,
                ]
                for t in model.tensors
            ],
            model.order,
            asdict(model.original) if isinstance(model, ComponentPlan) and model.original is not None else None,
        ]
        for model in plan.streamed
    ]


def _file_facts(source: Source, path: str, *, again: bool) -> list[Any]:
    """Path, size, time of the last change, the Hub's digest, and for safetensors a digest of the header."""
    place = source.local(path)
    facts = place.stat()
    header = None
    if SAFETENSORS.writes(path):
        before = None if again else source.headers.get(path)
        header = (before or header_of(source, path)).sha256
    return [path, facts.st_size, facts.st_mtime_ns, source.files()[path].sha256, header]


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed between two signatures, for people; nothing where they are the same."""
    found = []
    was, is_ = earlier.get("versions"), now["versions"]
    if was != is_:
        was = was if isinstance(was, dict) else {}
        found = [f"{name} {_show(was.get(name))} → {_show(is_[name])}" for name in is_ if was.get(name) != is_[name]]
        found = found or ["the versions changed"]
    for key in ("device", "plan", "source"):
        if earlier.get(key) != now[key]:
            found.append(f"the {key} changed")
    if not found and set(earlier) != set(now):
        found.append("its journal has another format")
    return found


def _show(version: Any) -> str:
    """A version from a journal, which may hold anything."""
    return version if isinstance(version, str) and _VERSION.fullmatch(version) else "none"
