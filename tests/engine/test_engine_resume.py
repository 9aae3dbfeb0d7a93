"""A run that was stopped goes on where it was, to the same bytes; and whatever is not sound is made again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stopping import StopAfter, convert

from aoconvert.checkpoint.unfinished import FILES_NAME, JOURNAL_NAME, journal_aside
from aoconvert.engine.convert import run
from aoconvert.engine.read import ComponentReading
from aoconvert.engine.resume_file import JournalFile, TensorLine, read_journal
from aoconvert.engine.staging import Stage, staged_output
from aoconvert.errors import Interrupted, ReadError
from aoconvert.options import QuantizeOptions
from aoconvert.planning.build import build_plan
from aoconvert.progress import Silent
from aoconvert.sources import resolve

HERE = Path(__file__).parent
SHARDS: dict[str, Any] = {"max_shard_size": "12KB"}


def contents(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    values = json.loads(found["aoconvert.json"])
    values.pop("run")
    return {**found, "aoconvert.json": values}


@pytest.fixture
def source(checkpoints: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy, to be changed."""
    import shutil

    shutil.copytree(checkpoints("llama-tied"), tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture(scope="module")
def expected(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an uninterrupted run gives, from one file to one file."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "source").symlink_to(checkpoints("llama-tied"))
    convert(folder / "source", folder / "out")
    return contents(folder / "out")


def stop(source: Path, output: Path, count: int, **options: Any) -> Path:
    """The unfinished folder of a run that was stopped after ``count`` tensors."""
    with pytest.raises(Interrupted):
        convert(source, output, StopAfter(count), **options)
    partial = output.parent / f".{output.name}.aoconvert-partial"
    found = read_journal(partial / JOURNAL_NAME)
    assert found is not None and sum(isinstance(line, TensorLine) for line in found[1]) == count
    return partial


def not_used(result: Any) -> list[str]:
    start = "the earlier run's work cannot be used: "
    return [line.removeprefix(start) for line in result.warnings if line.startswith(start)]


@pytest.mark.parametrize(
    ("family", "options", "counts"),
    [
        ("cogvideox", {}, (1, 60, 112, 200)),
        ("cogvideox", {"scheme": "int4dq", "components": ["transformer", "text_encoder"]}, (50, 125)),
        ("llama-tied", SHARDS, (3, 11, 20)),
        ("mixtral", SHARDS, (4, 15)),
        ("llama-tied", {**SHARDS, "format": "safetensors"}, (3, 11, 20)),
    ],
)
def test_it_goes_on_and_reads_nothing_twice(
    family: str,
    options: dict[str, Any],
    counts: tuple[int, ...],
    checkpoints: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = convert(checkpoints(family), tmp_path / "whole", **options)
    parts = (*whole.manifest.components, *whole.manifest.unquantized)
    names = [(tensor.file, tensor.name) for part in parts for tensor in part.tensors if tensor.file]
    seen: list[tuple[str, str]] = []
    read = ComponentReading.read

    def watched(self: ComponentReading, tensor: Any, *rest: Any) -> Any:
        seen.append((tensor.file, tensor.name))
        return read(self, tensor, *rest)

    done = 0
    for count in counts:
        with pytest.raises(Interrupted) as caught:
            convert(checkpoints(family), tmp_path / "out", StopAfter(count - done), **options)
        done = count
        said = f"interrupted; {count} of {len(names)} tensors are kept, run the same command again to continue"
        assert caught.value.message == said
        assert caught.value.hint == f"they are in {tmp_path}/.out.aoconvert-partial; --no-resume starts over"
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(ComponentReading, "read", watched)
    result = convert(checkpoints(family), tmp_path / "out", **options)
    assert (result.resumed, not_used(result)) == (done, [])
    assert len(set(seen)) == len(names) - done
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_all_tensors_are_there_and_only_the_end_is_missing(source: Path, tmp_path: Path, expected: Any) -> None:
    """Stopped after the last tensor, before its file was sealed; and after that."""
    count = sum(tensor["file"] is not None for tensor in expected["aoconvert.json"]["components"][0]["tensors"])
    stop(source, tmp_path / "out", count)
    result = convert(source, tmp_path / "out")
    assert result.resumed == count
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("options", [{}, SHARDS])
@pytest.mark.parametrize("how", ["flip", "cut", "grow", "gone", "link"])
def test_what_happened_to_the_files_meanwhile(
    how: str, options: dict[str, Any], source: Path, tmp_path: Path, expected: Any
) -> None:
    if options:
        convert(source, tmp_path / "whole", **options)
        expected = contents(tmp_path / "whole")
    partial = stop(source, tmp_path / "out", 12, **options)
    damaged = sorted(partial.rglob("*.bin"))[0]
    content = damaged.read_bytes()
    found = read_journal(partial / JOURNAL_NAME)
    assert found is not None
    ends = [line.size for line in found[1] if isinstance(line, TensorLine) and line.file.endswith(damaged.name)]
    middle = len(content) // 2
    damaged.unlink()
    if how == "link":
        (tmp_path / "mine").write_bytes(content)
        damaged.symlink_to(tmp_path / "mine")
    elif how != "gone":
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        damaged.write_bytes({"flip": flipped, "cut": content[:middle], "grow": content + b"more"}[how])
    result = convert(source, tmp_path / "out", **options)
    lost = {"grow": 0, "gone": len(ends), "link": len(ends)}.get(how, sum(end > middle for end in ends))
    assert result.resumed == 12 - lost
    assert not_used(result) == ([] if lost < 12 else ["its files are damaged or gone"])
    assert contents(tmp_path / "out") == expected
    if how == "link":
        assert (tmp_path / "mine").read_bytes() == content


@pytest.mark.parametrize("change", [{"scheme": "int8dq"}, {"skip": "re:.*q_proj.*"}, {"dtype": "float16"}, SHARDS])
def test_another_plan_starts_afresh(change: dict[str, Any], source: Path, tmp_path: Path) -> None:
    stop(source, tmp_path / "out", 5)
    result = convert(source, tmp_path / "out", **change)
    assert (result.resumed, not_used(result)) == (0, ["the plan changed"])
    convert(source, tmp_path / "whole", **change)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("options", [{}, SHARDS])
@pytest.mark.parametrize("hidden", [False, True])
def test_another_source_starts_afresh(hidden: bool, options: dict[str, Any], source: Path, tmp_path: Path) -> None:
    """Also where size and time say that nothing changed."""
    stop(source, tmp_path / "out", 5, **options)
    weights = source / "model.safetensors"
    facts = weights.stat()
    found = read_journal(tmp_path / ".out.aoconvert-partial" / JOURNAL_NAME)
    assert found is not None
    line = found[1][0]
    assert isinstance(line, TensorLine)
    [mark] = line.source.values()
    at = mark.position - 2
    content = bytearray(weights.read_bytes())
    content[at] ^= 1
    weights.write_bytes(content)
    if hidden:
        os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    result = convert(source, tmp_path / "out", **options)
    assert (result.resumed, not_used(result)) == (0, ["the source changed"])
    convert(source, tmp_path / "whole", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_before_the_result_has_its_name(
    source: Path, tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last moment before the folder is moved: it holds the manifest, and no longer the list of its files."""
    import shutil

    swap, partial = Stage._swap, tmp_path / ".out.aoconvert-partial"
    journal = journal_aside(tmp_path / "out")

    def keep_what_a_kill_leaves(stage: Stage) -> None:
        shutil.copytree(partial, tmp_path / "kept")
        shutil.copy2(journal, tmp_path / "journal")
        swap(stage)

    monkeypatch.setattr(Stage, "_swap", keep_what_a_kill_leaves)
    convert(source, tmp_path / "out")
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "kept").rename(partial)
    (tmp_path / "journal").rename(journal)
    assert not (partial / FILES_NAME).exists()
    result = convert(source, tmp_path / "out")
    assert (result.resumed, not_used(result)) == (20, [])
    assert contents(tmp_path / "out") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_another_version_starts_afresh(source: Path, tmp_path: Path, expected: Any) -> None:
    partial = stop(source, tmp_path / "out", 5)
    found = read_journal(partial / JOURNAL_NAME)
    assert found is not None
    signature = json.loads(json.dumps(found[0]))
    now = signature["versions"]["torchao"]
    signature["versions"]["torchao"] = "0.17.0"
    signature["versions"]["torch"] = "\033[31mred"
    JournalFile(partial / JOURNAL_NAME, signature, found[1]).close()
    result = convert(source, tmp_path / "out")
    torch = found[0]["versions"]["torch"]
    assert (result.resumed, not_used(result)) == (0, [f"torch none → {torch}, torchao 0.17.0 → {now}"])
    assert contents(tmp_path / "out") == expected


def test_no_resume(source: Path, tmp_path: Path, expected: Any) -> None:
    stop(source, tmp_path / "out", 5)
    result = convert(source, tmp_path / "out", resume=False)
    assert (result.resumed, not_used(result)) == (0, [])
    assert contents(tmp_path / "out") == expected


def test_interrupted_before_the_first_tensor(source: Path, tmp_path: Path) -> None:
    class Stop(Silent):
        def start(self, stage: str, total_bytes: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        convert(source, tmp_path / "out", Stop())
    assert (caught.value.message, caught.value.hint) == ("interrupted; the unfinished output was removed", None)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_interrupted_while_the_earlier_work_is_checked(source: Path, tmp_path: Path, expected: Any) -> None:
    class Stop(Silent):
        def advance(self, nbytes: int, current: str = "") -> None:
            raise KeyboardInterrupt

    stop(source, tmp_path / "out", 5)
    with pytest.raises(Interrupted, match=r"interrupted; 5 of \d+ tensors are kept"):
        convert(source, tmp_path / "out", Stop())
    result = convert(source, tmp_path / "out")
    assert result.resumed == 5
    assert contents(tmp_path / "out") == expected


def test_the_earlier_work_was_not_looked_at_yet(source: Path, tmp_path: Path, expected: Any) -> None:
    """The next run is stopped at once, or cannot read the source when it begins: nothing is lost."""
    partial = stop(source, tmp_path / "out", 5)
    kept = f"the work of an earlier run is still in {partial}; --no-resume starts over"
    with pytest.raises(Interrupted) as stopped, staged_output(tmp_path / "out"):
        raise KeyboardInterrupt
    assert (stopped.value.message, stopped.value.hint) == ("interrupted", kept)
    options = QuantizeOptions("int8wo", output=tmp_path / "out", device="cpu", min_quantized=0.0)
    plan = build_plan(resolve(str(source)), options, need_weights=True)
    weights, aside = source / "model.safetensors", tmp_path / "aside"
    weights.rename(aside)
    with pytest.raises(ReadError) as caught:
        run(plan, Silent(), command="")
    assert caught.value.hint == f"check the source; {kept}"
    aside.rename(weights)
    assert convert(source, tmp_path / "out").resumed == 5
    assert contents(tmp_path / "out") == expected


def test_a_read_error_in_the_middle(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """The source shrinks while it is read: what is finished stays, and the hint says so."""
    import shutil

    source = tmp_path / "source"
    shutil.copytree(checkpoints("cogvideox"), source)
    weights = source / "transformer" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()

    class Shrink(Silent):
        seen = 0

        def advance(self, nbytes: int, current: str = "") -> None:
            self.seen += 1
            if self.seen == 5:
                os.truncate(weights, len(content) // 2)

    with pytest.raises(ReadError) as caught:
        convert(source, tmp_path / "out", Shrink())
    assert caught.value.hint is not None
    assert " of 367 tensors are kept in " in caught.value.hint
    assert caught.value.hint.endswith("; --no-resume starts over")
    weights.write_bytes(content)
    convert(checkpoints("cogvideox"), tmp_path / "whole")
    result = convert(source, tmp_path / "out")
    assert not_used(result) == ["the source changed"]  # its time did
    assert (
        contents(tmp_path / "out")["transformer/diffusion_pytorch_model.bin"]
        == (tmp_path / "whole/transformer/diffusion_pytorch_model.bin").read_bytes()
    )


def campaign(source: Path, folder: Path, **task: Any) -> Any:
    values = {"source": str(source), "folder": str(folder), "scheme": "int8wo", "options": {"min_quantized": 0}, **task}
    done = subprocess.run(
        [sys.executable, HERE / "kill_runner.py", json.dumps(values)],
        capture_output=True,
        text=True,
        check=False,
        # a fork has none of the threads that torch believes in, and would wait for them for ever
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "problem" not in report, (report, done.stderr)
    return report


def may_mount(folder: Path) -> bool:
    (folder / "mounted").mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder / "mounted")]
    try:
        if subprocess.run(words, capture_output=True, check=False).returncode:
            return False
    except OSError:
        return False
    subprocess.run(["umount", str(folder / "mounted")], check=True)
    return True


@pytest.fixture(scope="module")
def attacked(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What became of runs that were killed, and of runs whose disk was full, where a small disk can be mounted."""
    folder = tmp_path_factory.mktemp("attacked")
    full = {"full": 4} if may_mount(folder) else {}
    return campaign(checkpoints("cogvideox"), folder, kills=10, seed=1, **full)


def test_killed_again_and_again(attacked: Any) -> None:
    """The same bytes in the end; never a folder that has a manifest and does not verify."""
    assert attacked["kills"] == 10
    assert max(attacked["resumed"]) > 0


@pytest.mark.parametrize("count", [4, pytest.param(30, marks=pytest.mark.exhaustive)])
def test_a_disk_that_is_full_somewhere(
    count: int, attacked: Any, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """At a random byte of the output, its journal, a copied file or the manifest: a clean error, and it goes on."""
    if "said" not in attacked:
        pytest.skip("a small disk cannot be mounted here")
    report = attacked if count == 4 else campaign(checkpoints("cogvideox"), tmp_path, full=count, seed=count)
    assert len(report["said"]) == count
    assert any(resumed > 0 for _, _, resumed in report["said"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize(
    ("family", "scheme", "options"),
    [
        ("cogvideox", "float8wo", {}),
        ("mixtral", "int8wo", {"max_shard_size": "20KB"}),
        ("wan", "int4dq", {}),
        ("mixtral", "int8wo", {"max_shard_size": "20KB", "format": "safetensors"}),
        ("cogvideox", "nvfp4wo", {"fuse_qkv": True}),
        ("mixtral", "float8dq_row", {"include_embeddings": True}),
        ("bert", "int4wo", {"layout_device": "cuda", "max_shard_size": "5MB"}),
    ],
)
def test_killed_a_hundred_times(
    family: str, scheme: str, options: Any, seed: int, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    options = {"min_quantized": 0, **options}
    report = campaign(checkpoints(family), tmp_path, kills=100, seed=seed, scheme=scheme, options=options)
    assert report["kills"] == 100
