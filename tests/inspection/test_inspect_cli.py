"""The command: what it prints, how it ends, and that it needs neither torch nor torchao."""

from __future__ import annotations

import json
import os
import pickle
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import aoconvert
from aoconvert.errors import SourceError

REPO = Path(__file__).parents[2]
LEGACY = REPO / "tests" / "fixtures" / "legacy"
OLD = LEGACY / "torchao-0.10.0" / "int8wo"
NEW = LEGACY / "torchao-0.17.0" / "int8dq_v2"


def run(
    *arguments: object, before: str = "", path: list[str] | None = None, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own; ``before`` runs first, ``path`` replaces the packages to import."""
    start = [sys.executable, "-S"] if path else [sys.executable]
    change = f"import sys; sys.path[:] = {path!r} + sys.path\n" if path else ""
    script = f"{change}{before}\nfrom aoconvert.cli.main import main\nmain({[str(item) for item in arguments]!r})"
    done = subprocess.run(
        [*start, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


def hostile(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "model.bin", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"f": eval}, protocol=2))
    return folder / "model.bin"


def test_for_people() -> None:
    text = run("inspect", OLD).stdout
    for words in ("torchao 0.7 to 0.17", "loads here   no", "4 × torchao.dtypes.affine", "scheme       int8wo"):
        assert words in text, text


def test_json_alone_on_stdout() -> None:
    done = run("inspect", NEW, "--json")
    found = json.loads(done.stdout)
    assert (found["scheme"], found["loads_here"], done.stderr) == ("int8dq", True, "")


def test_quiet_is_the_scheme_or_the_kind(tmp_path: Path) -> None:
    assert run("inspect", OLD, "-q").stdout == "int8wo\n"
    (tmp_path / "m.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    assert run("inspect", tmp_path / "m.gguf", "-q").stdout == "gguf\n"


def test_exit_codes(tmp_path: Path) -> None:
    done = run("inspect", hostile(tmp_path), "--json", code=4)
    found = json.loads(done.stdout)
    assert "builtins.eval" in found["unsafe"][0] or "__builtin__.eval" in found["unsafe"][0]
    assert "unsafe" in run("inspect", tmp_path / "model.bin", code=4).stdout
    assert "no such folder" in run("inspect", tmp_path / "absent" / "x" / "y", code=3).stderr
    assert "is truncated" in run("inspect", _truncated(tmp_path), code=3).stderr
    run("inspect", code=2)
    run("inspect", OLD, "--revision", "main", code=2)


def _truncated(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(b"\xff" * 5)
    return folder / "model.safetensors"


def test_help_has_examples() -> None:
    text = run("inspect", "--help").stdout
    assert "aoconvert inspect out" in text
    assert "inspect" in run("--help").stdout


def test_torchao_and_torch_that_cannot_be_imported(tmp_path: Path) -> None:
    """A broken installation: importing either raises, and nothing tries to."""
    hook = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'torchao'): raise RuntimeError('imported ' + name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    for folder in (OLD, NEW, LEGACY / "quanto" / "direct-int4", LEGACY / "torchao-0.6.1" / "float8dq_e4m3_perrow"):
        assert json.loads(run("inspect", folder, "--json", before=hook).stdout)["scheme"]
    # and it is the hook that decides: something that needs torch does fail under it
    assert "RuntimeError" in run("demo", tmp_path / "demo", before=hook, code=1).stderr


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is installed here, except torch and torchao."""
    folder = tmp_path_factory.mktemp("packages")
    for packages in site.getsitepackages():
        for entry in Path(packages).iterdir():
            if not entry.name.lower().startswith("torch") and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def test_no_torch_and_no_torchao_at_all(without_torch: Path) -> None:
    found = json.loads(run("inspect", NEW, "--json", path=[str(without_torch)]).stdout)
    assert (found["scheme"], found["loads_here"]) == ("int8dq", False)
    assert found["why_not"] == "torchao is not installed"
    assert "install it: pip install 'torchao>=0.15'" in found["advice"]


@pytest.mark.parametrize(
    ("version", "folder", "loads"),
    [
        ("0.14.1", NEW, False),
        ("0.15.0", NEW, True),
        ("0.17.0", NEW, True),
        ("0.17.0", OLD, True),
        ("0.18.0", OLD, False),
        ("0.6.1", OLD, False),
        ("0.13.0", LEGACY / "torchao-0.13.0" / "int4x_pergroup32_v2", True),
        ("0.14.1", LEGACY / "torchao-0.13.0" / "int4x_pergroup32_v2", False),
        ("0.19.0", NEW, None),
    ],
)
def test_another_torchao(version: str, folder: Path, loads: bool | None, without_torch: Path, tmp_path: Path) -> None:
    """Only the metadata of that version is installed, which is all that may be looked at."""
    facts = tmp_path / f"torchao-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torchao\nVersion: {version}\n")
    found = json.loads(run("inspect", folder, "--json", path=[str(tmp_path), str(without_torch)]).stdout)
    assert found["loads_here"] is loads
    assert (f"torchao {version} is installed" in (found["why_not"] or "")) == (loads is False)


def test_a_file_that_is_no_weights_file(tmp_path: Path) -> None:
    """One line and exit code 3, not a verdict about a pickle that it is not."""
    (tmp_path / "notes.txt").write_text("nothing to load here")
    with pytest.raises(SourceError, match=r"notes\.txt is not a weights file"):
        aoconvert.inspect(tmp_path / "notes.txt")


def test_a_blob_of_the_hub_cache_has_no_ending(tmp_path: Path) -> None:
    import torch

    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "0f3c")
    assert aoconvert.inspect(tmp_path / "0f3c").to_dict()["files"][0]["format"] == "bin"
