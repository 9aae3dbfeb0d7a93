"""A source that somebody writes to while it is read: the result is of one state of it, or there is none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import aoconvert
from aoconvert.engine.convert import run
from aoconvert.engine.staging import Stage
from aoconvert.engine.take_over import take_over
from aoconvert.errors import AoconvertError, Interrupted, ReadError
from aoconvert.planning.types import CopyPlan
from aoconvert.progress import Silent
from aoconvert.sources.folder import FolderSource

CHANGED = "changed while it was read"


class After(Silent):
    """Calls ``then`` when ``count`` tensors were written."""

    def __init__(self, count: int, then: Callable[[], object]) -> None:
        self.count, self.then, self.stage = count, then, ""

    def start(self, stage: str, total_bytes: int) -> None:
        self.stage = stage

    def advance(self, nbytes: int, current: str = "") -> None:
        self.count -= self.stage == "quantize"
        if self.count == 0 and self.stage == "quantize":
            self.then()


def as_safetensors(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    save_file(tensors, folder / "model.safetensors")


def as_bin(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def as_legacy(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_transposed(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    as_bin({name: t.T.contiguous().T if t.ndim == 2 else t for name, t in tensors.items()}, folder)


def as_shards(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Two, their tensors in turn, so that neither is read front to back at once."""
    names = sorted(tensors)
    where = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


KINDS = [as_safetensors, as_bin, as_legacy, as_transposed, as_shards]
FIRST = [
    pytest.param(kind, ahead, in_place, marks=[] if (at + ahead + in_place) % 3 == 0 else pytest.mark.exhaustive)
    for at, kind in enumerate(KINDS)
    for ahead in (True, False)
    for in_place in (True, False)
]
RESUMED = [
    pytest.param(kind, when, marks=[] if at in (number, number + 3) else pytest.mark.exhaustive)
    for at, kind in enumerate(KINDS)
    for number, when in enumerate(["between", "in the middle", "at the end"])
]


@pytest.fixture
def original(checkpoints: Callable[[str], Path]) -> Path:
    return checkpoints("llama-tied")


def written(original: Path, kind: Callable[..., None], folder: Path, factor: float = 1.0) -> Path:
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("model*.safetensors*"))
    kind({name: t * factor for name, t in load_file(original / "model.safetensors").items()}, folder)
    return folder


def overwrite(folder: Path, other: Path, *, in_place: bool = True) -> None:
    """Every weights file becomes the other's, of the same size and with the same time of its last change."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        facts = path.stat()
        content = (other / path.name).read_bytes()
        assert len(content) == facts.st_size
        if in_place:
            with path.open("r+b") as file:
                file.write(content)
        else:
            (path.parent / "new").write_bytes(content)
            (path.parent / "new").replace(path)
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def convert(source: Path, output: Path, progress: Any, *, ahead: bool) -> Any:
    """Through the API the files are hashed while libraries are imported."""
    options: dict[str, Any] = {"output": output, "device": "cpu", "min_quantized": 0.0}
    if ahead:
        return aoconvert.quantize(source, "int8wo", progress=progress, **options)
    return run(aoconvert.plan(source, "int8wo", **options), progress, command="")


def check(result: Any, source: Path) -> None:
    """Every source file in the manifest has the digest that it has now."""
    for entry in result.manifest.source.files:
        assert entry.sha256 == hashlib.sha256((source / entry.path).read_bytes()).hexdigest()


@pytest.mark.parametrize(("kind", "ahead", "in_place"), FIRST)
def test_a_first_run(kind: Callable[..., None], ahead: bool, in_place: bool, original: Path, tmp_path: Path) -> None:
    source = written(original, kind, tmp_path / "source")
    other = written(original, kind, tmp_path / "other", 2.0)
    progress = After(2, lambda: overwrite(source, other, in_place=in_place))
    with pytest.raises(ReadError, match=CHANGED):
        convert(source, tmp_path / "out", progress, ahead=ahead)
    assert not (tmp_path / "out").exists()
    result = convert(source, tmp_path / "out", Silent(), ahead=ahead)
    assert result.resumed == 0
    check(result, source)
    again = convert(other, tmp_path / "again", Silent(), ahead=ahead)
    ours, theirs = ([t.sha256 for t in r.manifest.components[0].tensors] for r in (result, again))
    assert ours == theirs


@pytest.mark.parametrize(("kind", "when"), RESUMED)
def test_a_resumed_run(kind: Callable[..., None], when: str, original: Path, tmp_path: Path) -> None:
    source = written(original, kind, tmp_path / "source")
    other = written(original, kind, tmp_path / "other", 2.0)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        convert(source, tmp_path / "out", After(5, stop), ahead=False)
    if when == "between":
        overwrite(source, other)
        result = convert(source, tmp_path / "out", Silent(), ahead=False)
        assert result.resumed == 0
        check(result, source)
        return
    total = sum(t.file is not None for t in aoconvert.plan(source, "int8wo", min_quantized=0.0).components[0].tensors)
    after = 7 if when == "in the middle" else total
    with pytest.raises(ReadError, match=CHANGED):
        convert(source, tmp_path / "out", After(after, lambda: overwrite(source, other)), ahead=False)
    result = convert(source, tmp_path / "out", Silent(), ahead=False)
    assert result.resumed == 0
    check(result, source)


@pytest.mark.parametrize("change", ["another", "fewer", "truncated", "gone", "not one", "fifo"])
def test_a_shard_in_the_middle(change: str, original: Path, tmp_path: Path) -> None:
    """Six shards, of which four stay open: the last one is another when its turn comes."""
    tensors = load_file(original / "model.safetensors")
    source = tmp_path / "source"
    shutil.copytree(original, source, ignore=shutil.ignore_patterns("model*.safetensors*"))
    names = list(tensors)
    where = {name: f"model-0000{1 + at * 6 // len(names)}-of-00006.safetensors" for at, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))

    def act() -> None:
        path = source / max(where.values())
        content = path.read_bytes()
        path.unlink()
        if change == "another":
            save_file({"other": torch.zeros(4)}, path)
        elif change == "fewer":
            save_file({name: tensors[name] for name in names[-1:]}, path)
        elif change == "truncated":
            path.write_bytes(content[:-1000])
        elif change == "not one":
            path.write_bytes(bytes(len(content)))
        elif change == "fifo":
            os.mkfifo(path)

    for ahead in (True, False):
        output = tmp_path / f"out-{ahead}"
        with pytest.raises(AoconvertError, match=f"{CHANGED}|cannot be (read|opened)|is not a file") as caught:
            convert(source, output, After(1, act), ahead=ahead)
        assert caught.value.exit_code in (1, 3)
        assert not output.exists()
        for file in set(where.values()):
            (source / file).unlink(missing_ok=True)
            save_file({name: tensors[name] for name in names if where[name] == file}, source / file)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_that_is_taken_over(in_place: bool, tmp_path: Path) -> None:
    source, other = tmp_path / "source", tmp_path / "other"
    for folder, content in ((source, b"a"), (other, b"b")):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(content * (9 << 20))

    class Overwrite(Silent):
        def advance(self, nbytes: int, current: str = "") -> None:
            overwrite(source, other, in_place=in_place)

    plans = [CopyPlan("model.safetensors", "part/model.safetensors", 9 << 20)]
    stage = Stage(tmp_path / "out")
    stage.announce([plans[0].path])
    with pytest.raises(ReadError, match=CHANGED):
        take_over(stage, FolderSource(source), plans, Overwrite())
    stage.discard()
    stage = Stage(tmp_path / "out")
    [entry] = take_over(stage, FolderSource(source), plans, Silent())
    assert entry.sha256 == hashlib.sha256((other / "model.safetensors").read_bytes()).hexdigest()
    assert (stage.root / "part/model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    stage.discard()
