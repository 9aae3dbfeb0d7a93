"""What the original gave: kept in the cache for the next scheme, and for a run that goes on after it was killed.

A folder holds ``data.pt`` (what both models are given), ``data.json`` (what that is) and, for each sample,
``sample-0000.safetensors`` and then ``sample-0000.json``; of a model also ``sensitivity.json``. The tensors:

- ``output``: logits of the positions that are compared, or the outputs of each token, in the dtype in which the model
  gives them, so that nothing is lost: a copy of the original has a KL of exactly 0. For 2,048 tokens and a vocabulary
  of 128,256 in bfloat16 that is 0.5 GB.
- ``targets``: the tokens that come next, where there are any.
- ``inputs.N``: some rows of what linear layers are given, once for layers that share them, in the model's dtype.
- ``experts.N``: of rows that a mixture routes, which expert each is for, int32.
- ``outputs.NAME``: X·Wᵀ of these rows, float32. The metadata ``inputs`` is a JSON object: name of layer, or of a stack
  of experts → N. The metadata ``transposed`` is a list of stacks whose matrices are (in, out).

Each file is written under another name first: one that is there is whole. The folders of all originals together have at
most ``$AOCONVERT_CACHE_LIMIT`` bytes (20 GB where it says nothing), but for those in use: the least recently used go.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aoconvert import cache
from aoconvert.errors import UsageError, WriteError
from aoconvert.options.fields import parse_size

KIND = "eval"
"""Its folder in aoconvert's cache."""

LIMIT = "AOCONVERT_CACHE_LIMIT"
_DEFAULT_LIMIT = 20 * 10**9

FORMAT = 3
"""Of the files; part of the key."""


@dataclass(frozen=True)
class References:
    """The folder of one original on one set of inputs."""

    folder: Path

    def data(self) -> dict[str, Any] | None:
        """What the inputs are; ``None`` where they are not made yet."""
        return self.read("data.json")

    def noise_floor(self, number: int) -> dict[str, Any] | None:
        """The figures of a sample with noise, ``{}`` without; ``None`` where the sample is not done."""
        return self.read(f"sample-{number:04d}.json")

    def sensitivity(self) -> dict[str, Any] | None:
        """``layers``: linear layer → what an error in it would do; or the ``reason`` why that is not known."""
        return self.read("sensitivity.json")

    def keep_sensitivity(self, found: Mapping[str, Any]) -> None:
        """Put it in place."""
        write_json(self.folder / "sensitivity.json", found)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of it; ``None`` where it is not there."""
        return _read(self.folder / name)

    def done(self, samples: int) -> list[int]:
        """The samples that are there."""
        return [number for number in range(samples) if self.noise_floor(number) is not None]

    def result(self, name: str) -> Path:
        """Where the figures of a result are kept, sample by sample."""
        return self.folder / "results" / name


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    return None


@contextlib.contextmanager
def open_references(facts: Mapping[str, Any]) -> Iterator[References]:
    """The folder for an original and inputs, by everything that their outputs depend on.

    Where the cache is switched off it is a folder for this run alone.

    Raises:
        UsageError: the limit is not a size.
        WriteError: it cannot be made.
    """
    limit = read_limit()
    with contextlib.ExitStack() as stack:
        name = cache.key({**facts, "format": FORMAT})
        try:
            folder = stack.enter_context(cache.hold(KIND, name))
        except OSError as error:
            raise WriteError(f"{error.filename}: {error.strerror}") from error
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aoconvert-eval-")))
        else:
            cache.shrink(KIND, limit)
            stack.callback(cache.shrink, KIND, limit)  # while this one is held: it stays
        yield References(folder)


def read_limit() -> int:
    """How many bytes may be kept, from ``AOCONVERT_CACHE_LIMIT`` (``20GB``).

    Raises:
        UsageError: not a size.
    """
    text = os.environ.get(LIMIT)
    if not text:
        return _DEFAULT_LIMIT
    try:
        return parse_size(text)
    except UsageError as error:
        raise UsageError(f"{LIMIT}: {error.message}", hint=error.hint) from error


def write_json(path: Path, value: Any) -> None:
    """Put a JSON file in place at once."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")
    draft.replace(path)
