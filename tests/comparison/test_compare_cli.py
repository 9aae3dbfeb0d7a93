"""``aoconvert diff``: exit codes, documents, what people see, and files that must not be trusted."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub.fixtures import HubClient
from helpers.checkpoints import build_llama
from helpers.documents import check_document
from safetensors.torch import load_file, save_file

from aoconvert.cli.main import main

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Iterator[Call]:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["diff", *map(str, arguments)])
        written = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, written.out, written.err

    return run


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A Llama, and one with another norm and without a head."""
    a = build_llama(tmp_path / "a")
    b = Path(shutil.copytree(a, tmp_path / "b"))
    tensors = load_file(b / "model.safetensors")
    tensors["model.norm.weight"] = -tensors["model.norm.weight"]
    del tensors["lm_head.weight"]
    save_file(tensors, b / "model.safetensors")
    return a, b


def test_equal(call: Call, models: tuple[Path, Path]) -> None:
    code, out, err = call(models[0], models[0])
    assert (code, err) == (0, "")
    assert out == "equal: 21 tensors the same\n"
    code, out, _ = call(models[0], models[0], "--json")
    assert code == 0
    value = json.loads(out)
    check_document("diff", value)
    assert value == {
        "equal": True,
        "same": 21,
        "different": [],
        "only_a": [],
        "only_b": [],
        "tied": [],
        "left_out": [],
    }
    assert call(models[0], models[0], "-q")[:2] == (0, "equal\n")


def test_different(call: Call, models: tuple[Path, Path]) -> None:
    code, out, err = call(*models)
    assert (code, err) == (1, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[1:] == [
        "model.norm.weight values -6.02 dB 64 of 64 values",
        "only in A: lm_head.weight",
        "different: 1; 19 tensors the same",
    ]
    code, out, _ = call(*models, "--json")
    assert code == 1
    value = json.loads(out)
    check_document("diff", value)
    assert (value["equal"], value["same"], value["only_a"], value["only_b"]) == (False, 19, ["lm_head.weight"], [])
    [item] = value["different"]
    assert (item["name"], item["what"], round(item["sqnr_db"], 2)) == ("model.norm.weight", "values", -6.02)
    assert call(*models, "-q")[:2] == (1, "different\n")


class _Attack:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


def _hostile(path: Path) -> None:
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, pickle.dumps({"w": _Attack()}, 2) if name.endswith("data.pkl") else content)


def _cut(path: Path) -> None:
    save_file({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def _gguf(path: Path) -> None:
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))


def _part_missing(path: Path) -> None:
    entry = {"_type": "Int8Tensor", "_data": {"block_size": [1, 4]}, "_tensor_data_names": ["qdata", "scale"]}
    metadata = {"tensor_names": '["w.weight"]', "w.weight": json.dumps(entry)}
    save_file({"w._weight_qdata": torch.ones(2, 4, dtype=torch.int8)}, path, metadata)


@pytest.mark.parametrize(
    ("name", "write", "code", "message"),
    [
        ("x.bin", _hostile, 4, "mkdir is not a name that a checkpoint may use"),
        ("x.safetensors", _cut, 3, "is truncated"),
        ("x.gguf", _gguf, 3, "x.gguf is a GGUF file, which diff does not read"),
        ("x.safetensors", _part_missing, 3, "w.weight lacks one of its parts: qdata, scale"),
        ("x.txt", lambda path: path.write_text("no weights"), 3, "is not a weights file"),
        ("x", lambda path: path.mkdir(), 3, "holds no weights"),
        ("./absent", lambda path: None, 3, "no such folder"),
    ],
    ids=["pickle", "truncated", "gguf", "part missing", "text", "empty", "absent"],
)
def test_files_that_cannot_be_compared(
    call: Call,
    models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[Path], Any],
    code: int,
    message: str,
) -> None:
    """One line, whichever side it is, and nothing is executed."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    for sides in ((name, models[0]), (models[0], name)):
        found, out, err = call(*sides)
        assert (found, out) == (code, "")
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert message in errors[0]
        assert "Traceback" not in err
        found, out, _ = call(*sides, "--json")
        assert (found, json.loads(out)["error"]["exit_code"]) == (code, code)
        check_document("error", json.loads(out))
    assert not (tmp_path / "owned").exists()


def test_parts_that_do_not_fit_each_other(call: Call, tmp_path: Path) -> None:
    """torchao cannot make numbers of them: that is said, and the codes are compared all the same."""
    entry = {
        "_type": "Int8Tensor",
        "_data": {"block_size": [1, 4], "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}},
        "_tensor_data_names": ["qdata", "scale"],
    }
    metadata = {"tensor_names": '["w.weight"]', "w.weight": json.dumps(entry)}
    for side, value in (("a", 1), ("b", 2)):
        codes = torch.full((2, 4), value, dtype=torch.int8)
        tensors = {"w._weight_qdata": codes, "w._weight_scale": torch.ones(7, 3)}
        save_file(tensors, tmp_path / f"{side}.safetensors", metadata)
    code, out, _ = call(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json")
    [item] = json.loads(out)["different"]
    assert (code, item["what"], item["sqnr_db"]) == (1, "codes", None)
    assert item["detail"] == "8 of 8 qdata; Int8Tensor cannot be turned into numbers here"


def test_a_repo_and_a_folder(hub_client: HubClient, models: tuple[Path, Path]) -> None:
    state = hub_client.hub.state
    state.create_repo("user/model")
    [_, commit] = [state.commit("user/model", {file.name: file for file in folder.iterdir()}) for folder in models]
    script = f"""
import aoconvert
result = attempt(lambda: aoconvert.diff('user/model@{commit}', {str(models[0])!r}).to_dict())
"""
    found = hub_client.run(script)["value"]
    assert (found["same"], found["only_a"], found["only_b"]) == (19, [], ["lm_head.weight"])
