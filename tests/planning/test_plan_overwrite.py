"""``--overwrite`` replaces what aoconvert wrote, and deletes nothing of anybody else."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.checkpoints import build_llama

import aoconvert
from aoconvert.cards import CardOptions, render, write
from aoconvert.checkpoint.files import check_files, notes
from aoconvert.engine.staging import Stage
from aoconvert.errors import PlanError, WriteError
from aoconvert.planning.overwriting import foreign_files
from aoconvert.progress import Silent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result with its card, beside its source."""
    root = tmp_path_factory.mktemp("overwrite")
    build_llama(root / "model")
    aoconvert.quantize(root / "model", "int8wo", output=root / "out", device="cpu")
    write(root / "out", render(root / "out", CardOptions()))
    (root / "out/aoconvert.verify.json").write_text("{}")
    return root / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def replace(out: Path, made: Path) -> None:
    aoconvert.quantize(made.parent / "model", "float8wo", output=out, device="cpu", overwrite=True)


def test_a_result_with_its_card_is_replaced(out: Path, made: Path) -> None:
    assert foreign_files(out) == []
    replace(out, made)
    assert aoconvert.checkpoint.manifest.load(out).components[0].scheme == "float8wo"
    assert not (out / "README.md").exists()


def edit(path: str, text: str = "mine") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    return change


def link(folder: Path) -> None:
    (folder / "elsewhere").symlink_to(folder.parent)


def empty_folder(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).mkdir(parents=True)


def card(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("## Limits", "## My limits"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (edit("notes.txt"), "notes.txt"),
        (edit("README.md"), "README.md"),
        (card, "README.md"),
        (edit("samples/a.png"), "samples/"),
        (edit(".git/config"), ".git/"),
        (edit(".env"), ".env"),
        (edit("config.json"), "config.json"),
        (edit("model.safetensors"), "model.safetensors"),
        (link, "elsewhere"),
        (empty_folder("samples"), "samples/"),
        (empty_folder("samples/of/mine"), "samples/"),
    ],
)
def test_what_is_not_ours_stays(change: Callable[[Path], None], named: str, out: Path, made: Path) -> None:
    change(out)
    before = {path: path.is_file() and path.read_bytes() for path in out.rglob("*")}
    with pytest.raises(PlanError) as caught:
        replace(out, made)
    assert caught.value.exit_code == 3
    [problem] = caught.value.problems
    assert problem.endswith(f"changed since: {named} (move it away, or choose another --output)")
    assert {path: path.is_file() and path.read_bytes() for path in out.rglob("*")} == before
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def test_all_are_listed_in_one_line(out: Path, made: Path) -> None:
    for path in ("b.txt", "a.txt", "samples/one.png", "samples/deep/two.png"):
        edit(path)(out)
    with pytest.raises(PlanError, match=r"changed since: a\.txt, b\.txt, samples/ \(move"):
        replace(out, made)


def test_a_manifest_that_cannot_be_read(out: Path, made: Path) -> None:
    edit("aoconvert.json", "{}")(out)
    with pytest.raises(PlanError, match=r"cannot be replaced: .*schema_version"):
        replace(out, made)


def test_what_came_while_it_ran(out: Path, made: Path) -> None:
    class Visit(Silent):
        def finish(self) -> None:
            edit("notes.txt")(out)

    with pytest.raises(WriteError, match=r"notes\.txt"):
        aoconvert.quantize(
            made.parent / "model", "float8wo", output=out, device="cpu", overwrite=True, progress=Visit()
        )
    assert (out / "notes.txt").read_text() == "mine"
    assert aoconvert.checkpoint.manifest.load(out).components[0].scheme == "int8wo"


def test_the_folder_beside_it(tmp_path: Path, made: Path) -> None:
    """Where a run builds its files may be somebody else's folder by that name."""
    edit(".out.aoconvert-partial/notes.txt")(tmp_path)
    with pytest.raises(PlanError, match="holds files that aoconvert did not write"):
        aoconvert.quantize(made.parent / "model", "int8wo", output=tmp_path / "out", device="cpu")
    assert (tmp_path / ".out.aoconvert-partial/notes.txt").read_text() == "mine"
    Stage(tmp_path / "other").leave()
    aoconvert.quantize(made.parent / "model", "int8wo", output=tmp_path / "other", device="cpu")
    assert not (tmp_path / ".other.aoconvert-partial").exists()


def test_verify_says_the_same(out: Path) -> None:
    """An edited card does not hinder anybody, and is said; another file that nobody lists fails."""
    found = aoconvert.checkpoint.manifest.load(out)
    assert check_files(out, found)[0] == notes(out) == []
    card(out)
    assert check_files(out, found)[0] == []
    assert notes(out) == ["README.md was edited by hand"]
    edit("notes.txt")(out)
    assert check_files(out, found)[0] == ["notes.txt is not in the manifest"]


@pytest.mark.parametrize("name", ["README.md", "config.json", "notes.txt"])
def test_a_file_of_any_size(name: str, out: Path) -> None:
    """It is somebody's, and not read for it: a file of holes has 64 GB and takes no room."""
    (out / name).unlink(missing_ok=True)
    with (out / name).open("wb") as file:
        file.truncate(64 << 30)
    before = time.process_time()
    found = foreign_files(out)
    assert time.process_time() - before < 2
    assert found == [name]
