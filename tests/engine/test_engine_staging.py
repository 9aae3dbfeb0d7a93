"""The output folder: it appears whole or not at all, and what it takes over is copied and hashed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import aoconvert
from aoconvert.checkpoint.unfinished import JOURNAL_NAME
from aoconvert.engine.staging import Stage, staged_output
from aoconvert.errors import PlanError, WriteError
from aoconvert.hub.contents import read_contents
from aoconvert.hub.types import PushOptions
from aoconvert.planning.output import output_problems
from aoconvert.planning.overwriting import tidy
from aoconvert.progress import Silent
from aoconvert.sources.folder import FolderSource


@pytest.fixture(scope="module")
def converted(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    aoconvert.quantize(checkpoints("llama-tied"), "int8wo", output=out, device="cpu", min_quantized=0.0)
    return out


def test_nothing_under_the_name_before_it_is_placed(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "out")
    entry = stage.write_text("sub/config.json", "{}")
    assert not (tmp_path / "out").exists()
    stage.publish(b"manifest")
    assert (tmp_path / "out/sub/config.json").read_text() == "{}"
    assert (tmp_path / "out/aoconvert.json").read_text() == "manifest"
    assert (entry.size, entry.sha256) == (2, hashlib.sha256(b"{}").hexdigest())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_discard_leaves_nothing(tmp_path: Path) -> None:
    """Not even the folders above it that were made for it."""
    (tmp_path / "mine").mkdir()
    stage = Stage(tmp_path / "mine" / "new" / "deep" / "out")
    stage.write_text("config.json", "{}")
    stage.discard()
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    """The earlier result was set aside and the new one not yet placed: the next run puts it back first."""
    aside = tmp_path / ".out.aoconvert-replaced"
    aside.mkdir()
    (aside / "old").write_text("old")
    Stage(tmp_path / "out").discard()
    assert (tmp_path / "out/old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_waits_for_the_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    stage = Stage(out)
    stage.write_text("new", "new")
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        os.kill(os.getpid(), signal.SIGINT)  # arrives before each of the renames
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage.publish(b"")
    monkeypatch.undo()
    assert sorted(path.name for path in out.iterdir()) == ["aoconvert.json", "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_after_it_is_published_speaks_of_no_kept_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails when the folder above is flushed: the output is whole, and its lock is let go once."""
    out, fsync = tmp_path / "out", os.fsync

    def fail(descriptor: int) -> None:
        if out.exists():
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WriteError) as caught, staged_output(out) as stage:
        stage.kept = stage.total = 5
        stage.publish(b"")
    assert caught.value.hint is None
    assert [path.name for path in out.iterdir()] == ["aoconvert.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_result_stays_until_the_new_one_is_there(converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(converted, out)
    stage = Stage(out)
    stage.write_text("new", "new")
    assert (out / "aoconvert.json").exists()
    stage.publish(b"")
    assert sorted(path.name for path in out.iterdir()) == ["aoconvert.json", "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_is_removed_but_for_what_is_wanted(tmp_path: Path) -> None:
    left = tmp_path / ".out.aoconvert-partial"
    (left / "transformer").mkdir(parents=True)
    for name in ("half.bin", "other.bin"):
        (left / "transformer" / name).write_bytes(b"half")
    stage = Stage(tmp_path / "out")
    stage.announce(["transformer/half.bin", "transformer/other.bin"])
    stage.clear(["transformer/half.bin", "../source", "gone"])
    assert [path.name for path in left.rglob("*.bin")] == ["half.bin"]
    stage.clear()
    assert sorted(path.name for path in left.rglob("*")) == ["aoconvert.files", "aoconvert.lock"]
    stage.discard()


OTHERS: dict[str, Callable[[Path], object]] = {
    "notes.txt": lambda path: path.write_text("mine"),
    "config.json.mine": lambda path: path.write_text("mine"),
    "pytorch_model.bin.orig": lambda path: path.write_text("mine"),
    ".notes.0123456789abcdef": lambda path: path.write_text("mine"),
    "aoconvert.notes": lambda path: path.write_text("mine"),
    "transformer/aoconvert.lock": lambda path: path.write_text("mine"),
    "samples/a.png": lambda path: path.write_text("mine"),
    "transformer/notes/": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to("nowhere"),
    "pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_others_put_into_the_unfinished_folder_stays(name: str, tmp_path: Path) -> None:
    """It is named, and nothing is removed: not by a run that would begin, nor by one that gives up."""
    stage = Stage(tmp_path / "out")
    stage.announce(["config.json", "pytorch_model.bin", "transformer/config.json"])
    stage.write_text("pytorch_model.bin", "half")
    stage.leave()
    place = stage.root / name
    place.parent.mkdir(parents=True, exist_ok=True)
    OTHERS[name](place)
    before = sorted(stage.root.rglob("*"))
    [problem] = output_problems(FolderSource(tmp_path / "model"), tmp_path / "out", overwrite=False)
    assert f"did not write: {name} (move it away)" in problem
    later = Stage(tmp_path / "out")
    with pytest.raises(WriteError, match=f"did not write: {name.rstrip('/')}"):
        later.clear()
    later.leave()
    assert sorted(stage.root.rglob("*")) == before
    Stage(tmp_path / "out").discard()
    assert os.path.lexists(place)
    assert not (stage.root / "pytorch_model.bin").exists()


def test_a_folder_by_the_name_of_what_was_replaced(converted: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / ".out.aoconvert-replaced"
    shutil.copytree(converted, out)
    for copied in (False, True):
        shutil.copytree(converted, other) if copied else other.mkdir()
        (other / "notes.txt").write_text("mine")
        tidy(out)
        with pytest.raises(WriteError, match=r"cannot be replaced|notes\.txt"):
            Stage(out)
        assert (other / "notes.txt").read_text() == "mine"
        shutil.rmtree(other)


@pytest.mark.parametrize("source", ["flux", "llama-tied"])
def test_a_run_announces_every_file_that_it_writes(
    source: str, checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it leaves is whatever it had come to: with all of it there, nothing is taken for somebody else's."""
    left = tmp_path / ".out.aoconvert-partial"

    def stop(stage: Stage, manifest: str) -> None:
        raise WriteError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "publish", stop)
        with pytest.raises(WriteError):
            aoconvert.quantize(checkpoints(source), "int8wo", output=tmp_path / "out", max_shard_size="30KB")
    there = {path.relative_to(left).as_posix() for path in left.rglob("*") if path.is_file()}
    listed = set(json.loads((left / "aoconvert.files").read_text()))
    assert len(there) > 4
    assert there - listed == {"aoconvert.files", "aoconvert.journal"}
    aoconvert.quantize(checkpoints(source), "float8wo", output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").glob("aoconvert.files"))


def test_no_link_is_followed_or_kept(tmp_path: Path) -> None:
    """Somebody put links in the unfinished folder: what they lead to is neither removed nor written on."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious").write_text("precious")
    left = tmp_path / ".out.aoconvert-partial"
    left.mkdir()
    (left / "folder").symlink_to(mine)
    (left / "file").symlink_to(mine / "precious")
    (left / "hard").hardlink_to(mine / "precious")
    stage = Stage(tmp_path / "out")
    stage.clear(["folder/precious", "file", "hard"])
    assert [path.name for path in left.iterdir()] == ["aoconvert.lock"]
    assert (mine / "precious").read_text() == "precious"
    stage.discard()


def test_a_kill_while_it_is_placed_keeps_the_journal(tmp_path: Path) -> None:
    """The journal is moved aside just before the manifest appears."""
    stage = Stage(tmp_path / "out")
    stage.write_text("weights.bin", "weights")
    stage.leave()
    aside = tmp_path / f".out.{JOURNAL_NAME}"
    aside.write_text("journal")
    stage = Stage(tmp_path / "out")
    assert (stage.root / JOURNAL_NAME).read_text() == "journal"
    assert not aside.exists()
    stage.publish(b"")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["aoconvert.json", "weights.bin"]


def test_a_kill_after_it_was_placed_leaves_no_journal(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / f".out.{JOURNAL_NAME}").write_text("journal")
    stage = Stage(tmp_path / "out")
    assert not (stage.root / JOURNAL_NAME).exists()
    stage.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("command", ["quantize", "verify", "card", "push", "inspect"])
def test_the_next_command_tidies_up(command: str, converted: Path, tmp_path: Path) -> None:
    """The run was killed when its output was in place, and nothing else was removed yet."""
    out = tmp_path / "out"
    shutil.copytree(converted, out)
    (tmp_path / f".out.{JOURNAL_NAME}").write_text("journal")
    shutil.copytree(converted, tmp_path / ".out.aoconvert-replaced")
    (tmp_path / ".out.aoconvert-replaced/config.json").unlink()  # it was at it
    if command == "quantize":
        with pytest.raises(PlanError, match="exists and is not empty"):
            aoconvert.quantize(tmp_path / "out", "int8wo", output=out, device="cpu")
    elif command == "verify":
        (out / "config.json").write_text("{}")  # so that it ends early
        assert not aoconvert.verify(out).ok
    elif command == "card":
        aoconvert.card(out)
    elif command == "push":
        read_contents(out, "me/model", PushOptions(), Silent())
    else:
        aoconvert.inspect(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_living_run_needs_stays(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "out")
    (tmp_path / f".out.{JOURNAL_NAME}").write_text("journal")
    (tmp_path / ".out.aoconvert-replaced").mkdir()
    tidy(tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == 3
    stage.discard()
    tidy(tmp_path / "out")  # it is what an earlier result was moved to
    assert len(list(tmp_path.iterdir())) == 2


def test_the_journal_comes_back_where_the_name_is_taken(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "out")
    stage.write_text(JOURNAL_NAME, "journal")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(WriteError):
        stage.publish(b"")
    assert (stage.root / JOURNAL_NAME).read_text() == "journal"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.aoconvert-partial", "out"]
    stage.discard()


def test_a_living_run_is_not_disturbed(tmp_path: Path) -> None:
    first = Stage(tmp_path / "out")
    first.write_text("config.json", "{}")
    with pytest.raises(PlanError, match=rf"another aoconvert \(process {os.getpid()}\) is writing to .*/out$"):
        Stage(tmp_path / "out")
    (first.root / "aoconvert.lock").unlink()  # it is only for the message
    with pytest.raises(PlanError, match="another aoconvert is writing"):
        Stage(tmp_path / "out")
    assert (first.root / "config.json").exists()
    first.discard()
    Stage(tmp_path / "out").discard()


@pytest.mark.parametrize("command", ["quantize", "repack"])
def test_a_living_run_is_seen_before_torch_is_imported(command: str, converted: Path, tmp_path: Path) -> None:
    script = (
        "import sys, aoconvert\n"
        "command, source, output = sys.argv[1:]\n"
        "try:\n    getattr(aoconvert, command)(source, 'int8wo' if command == 'quantize' else 'cpu', output=output)\n"
        "except aoconvert.PlanError as error:\n    print(error.problems[0], error.retryable, 'torch' in sys.modules)\n"
    )
    out = tmp_path / "out"
    source = converted if command == "repack" else converted.parent / "model"
    if command == "quantize":
        source.mkdir()
        config = json.loads((converted / "config.json").read_text())
        del config["quantization_config"]
        (source / "config.json").write_text(json.dumps(config))
    stage = Stage(out)
    arguments = [sys.executable, "-c", script, command, str(source), str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout == f"another aoconvert (process {os.getpid()}) is writing to {out} True False\n", done.stderr
    assert (stage.root / "aoconvert.lock").exists()
    stage.discard()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_goes_with_the_process(tmp_path: Path) -> None:
    """A lock of the kernel: a killed owner holds nothing, whatever it wrote down."""
    (tmp_path / ".out.aoconvert-partial").mkdir()
    (tmp_path / ".out.aoconvert-partial" / "aoconvert.lock").write_text("1\n")  # a process that lives
    stage = Stage(tmp_path / "out")
    assert (stage.root / "aoconvert.lock").read_text() == f"{os.getpid()}\n"
    handle = os.open(stage.root, os.O_RDONLY)
    with pytest.raises(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)
    stage.discard()


def test_no_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file"):
        Stage(tmp_path / "file" / "out")


def test_what_is_taken_over_is_a_copy(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoints("cogvideox"), source)
    big = source / "transformer" / "diffusion_pytorch_model.safetensors"
    result = aoconvert.quantize(
        source,
        "int8wo",
        output=tmp_path / "out",
        device="cpu",
        components=["text_encoder"],
        keep_original_files=True,
    )
    same = tmp_path / "out/transformer/diffusion_pytorch_model.safetensors"
    assert big.stat().st_size > 1 << 20
    assert (same.stat().st_nlink, big.stat().st_nlink) == (1, 1)  # an edit of one would be an edit of the other
    for entry in result.manifest.files():
        content = (tmp_path / "out" / entry.path).read_bytes()
        assert (entry.size, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest()), entry.path
    [weights] = result.manifest.source.files
    assert weights.sha256 == hashlib.sha256((source / weights.path).read_bytes()).hexdigest()


@pytest.mark.parametrize(("family", "library"), [("wan", "diffusers"), ("llama-tied", "transformers")])
def test_quantization_config_is_canonical(
    family: str, library: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """Both libraries read it back, and quantizing on the fly from it gives the same weights."""
    from helpers import tiny

    aoconvert.quantize(checkpoints(family), "int4dq", output=tmp_path / "out", device="cpu")
    folder = tmp_path / "out" / ("transformer" if library == "diffusers" else "")
    config = json.loads((folder / "config.json").read_text())
    module = tiny.diffusers if library == "diffusers" else tiny.transformers
    parsed = module.TorchAoConfig.from_dict(config["quantization_config"])
    assert parsed.to_dict()["quant_type"] == config["quantization_config"]["quant_type"]
    source = checkpoints(family)
    if library == "diffusers":
        fresh = tiny.diffusers.WanTransformer3DModel.from_pretrained(
            source, subfolder="transformer", torch_dtype=torch.bfloat16, quantization_config=parsed
        )
    else:
        fresh = tiny.transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16, quantization_config=parsed
        )
    written = torch.load(next(folder.glob("*.bin")), weights_only=True)
    expected = fresh.state_dict()
    for name, tensor in written.items():
        assert type(tensor) is type(expected[name]), name
        if hasattr(tensor, "qdata"):
            assert torch.equal(tensor.qdata, expected[name].qdata), name
