"""Hostile pickles: each is refused by our own error, fast and small, and nothing of it runs."""

import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hostile_pickles import archive, bombs, code_cases, named_cases, structure_cases, tensor, top, wrapper

from aoconvert.errors import AoconvertError, UnsafePickleError
from aoconvert.formats.torch_bin.header import read_bin, read_loadable
from aoconvert.formats.torch_bin.reader import TorchBinReader
from aoconvert.verification.process import Children

HERE = Path(__file__).parent
WRONG = named_cases() | structure_cases()


def run(mode, canary, folder, pickles):
    folder.mkdir()
    (folder / "0 clean").write_bytes(archive(top(tensor())))
    names = {f"{index:03d}": name for index, name in enumerate(pickles)}
    for number, name in names.items():
        (folder / number).write_bytes(archive(pickles[name]))
    command = [sys.executable, str(HERE / "hostile_runner.py"), mode, str(canary), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[2]), "BROWSER": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    clean = report["results"].pop("0 clean")
    return {names[number]: result for number, result in report["results"].items()}, clean, report["peak"]


@pytest.fixture(scope="module")
def canary(tmp_path_factory):
    return tmp_path_factory.mktemp("canary") / "canary"


@pytest.fixture(scope="module")
def ours(tmp_path_factory, canary):
    pickles = code_cases(canary)
    pickles |= {name: pickled for name, (pickled, _) in WRONG.items()}
    return run("ours", canary, tmp_path_factory.mktemp("ours") / "files", pickles)


@pytest.mark.parametrize("name", [*code_cases("x"), *WRONG])
def test_refused_without_a_side_effect(name, ours):
    kind, message, seconds, events, found = ours[0][name]
    assert kind == "refused", (kind, message)
    assert not found
    assert events == []
    assert seconds < 5
    assert len(message) < 600
    assert message.isprintable()
    assert re.search(r"data\.pkl(, byte \d+)?: ", message)


def test_the_clean_file_is_read_and_memory_stays_small(ours):
    assert ours[1][0] == "read"
    assert ours[2] < 1 << 30


def test_the_same_code_runs_in_a_real_unpickler(tmp_path, canary):
    """The control: canary and audit hook do fire, so their silence above means something."""
    results, clean, _ = run("real", canary, tmp_path / "files", code_cases(canary))
    assert clean[0] == "ModuleNotFoundError" or not clean[4]
    assert not [name for name, result in results.items() if not result[4]]
    assert not [name for name, result in results.items() if not result[3]]


@pytest.mark.parametrize("name", code_cases("x"))
def test_the_refusal_says_what_and_where(name, tmp_path):
    path = tmp_path / "model.bin"
    pickled = code_cases(tmp_path / "canary")[name]
    path.write_bytes(archive(pickled))
    with pytest.raises(UnsafePickleError) as caught:
        read_loadable(path)
    assert caught.value.exit_code == 4
    assert caught.value.message.startswith(f"{path}: data.pkl, byte {caught.value.position}: ")
    assert 0 <= caught.value.position < len(pickled)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", WRONG)
def test_the_refusal_is_the_right_one(name, ours):
    _, expected = WRONG[name]
    assert re.search(re.escape(expected) if name.startswith("name ") else expected, ours[0][name][1])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if "attributes" in name else pytest.mark.exhaustive) for name in bombs()]
)
def test_a_bomb_takes_memory_in_proportion_to_its_size(name, tmp_path):
    """And quantize reads a source through the same reader."""
    pickled = bombs()[name]
    (tmp_path / "pytorch_model.bin").write_bytes(archive(pickled))
    tracemalloc.start()
    for read in (read_bin, TorchBinReader):
        tracemalloc.reset_peak()
        began = time.process_time()
        with pytest.raises(AoconvertError, match=r"nested too deeply, or repeat each other|more than"):
            read(tmp_path / "pytorch_model.bin")
        assert time.process_time() - began < 20
        assert tracemalloc.get_traced_memory()[1] < 20_000_000 + 120 * len(pickled)
    tracemalloc.stop()


def test_many_views_of_one_storage(tmp_path):
    """As many reads of the same bytes as no checkpoint needs; the same view under many names is one."""
    base = torch.zeros(10_000_000)
    torch.save({f"{at}": base for at in range(20_000)}, tmp_path / "one.bin")
    assert len(read_bin(tmp_path / "one.bin").tensors) == 20_000
    torch.save({f"{at}": base[at:] for at in range(40)}, tmp_path / "views.bin")
    with pytest.raises(
        UnsafePickleError, match=r"tensors take 1,599,996,880 bytes out of storages that hold 40,000,000"
    ):
        read_bin(tmp_path / "views.bin")


def test_names_are_in_the_message_with_their_position(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(archive(b"\x80\x02}X\x01\x00\x00\x00acposix\nsystem\nX\x02\x00\x00\x00id\x85Rs."))
    with pytest.raises(UnsafePickleError, match=r"a\.bin: data\.pkl, byte 9: posix\.system is not a name") as caught:
        read_bin(path)
    assert caught.value.position == 9
    assert caught.value.hint


def test_the_builders_make_readable_files(tmp_path):
    """Each hostile tensor differs from a clean one by what is hostile in it alone."""
    path = tmp_path / "a.bin"
    path.write_bytes(archive(b"\x80\x02}(" + top(tensor(), "a")[3:-2] + top(wrapper(), "b")[3:-2] + b"u."))
    contents = read_bin(path)
    assert list(contents.tensors) == ["a", "b"]
    assert contents.tensors["b"].inner["qdata"].data == contents.tensors["a"].data
    assert read_loadable(path) == contents


@pytest.mark.parametrize("child", ["load_child", pytest.param("reload_child", marks=pytest.mark.exhaustive)])
def test_a_storage_is_hashed_once(child, tmp_path):
    """8 MB under 20,000 names would be 160 GB."""
    torch.save({f"{at}": torch.zeros(2_000_000) for at in range(1)}, tmp_path / "one.bin")
    base = torch.load(tmp_path / "one.bin")["0"]
    digest = sha256(bytes(8_000_000)).hexdigest()
    if child == "load_child":
        torch.save({f"{at}": base for at in range(20_000)}, tmp_path / "model.bin")
        with Children() as children:
            answers = children.ask(child, {"files": [str(tmp_path / "model.bin")], "imports": [], "safe_globals": []})
        assert len(answers) == 20_001
        assert {answer["sha256"] for answer in answers[:-1]} == {digest}
        return
    code = (
        "import torch\nmodel = torch.nn.Module()\nmodel.one = torch.nn.Parameter(torch.zeros(2_000_000))\n"
        "for at in range(20_000): model.register_parameter(f'p{at}', model.one)"
    )
    expected = {f"p{at}": ["torch.Tensor", digest] for at in range(20_000)}
    request = {"code": code, "folder": str(tmp_path), "parts": {"": expected}, "reports": {}, "places": {}}
    request |= {"originals": {}, "forward": False, "example": None}
    with Children() as children:
        answer = children.ask(child, request)[1]
    assert (answer["part"], answer["problems"], list(answer["tensors"])) == ("", [], ["one"])
