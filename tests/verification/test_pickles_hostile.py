"""Hostile pickles: each is refused by our own error, fast and small, and nothing of it runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hostile_pickles import archive, code_cases, named_cases, structure_cases, tensor, top, wrapper

from aoconvert.errors import UnsafePickleError
from aoconvert.verification.pickles import check_bin, read_bin

HERE = Path(__file__).parent
WRONG = named_cases() | structure_cases()


def run(mode, canary, folder, pickles):
    folder.mkdir()
    (folder / "0 clean").write_bytes(archive(top(tensor())))
    names = {f"{index:03d}": name for index, name in enumerate(pickles)}
    for number, name in names.items():
        (folder / number).write_bytes(archive(pickles[name]))
    command = [sys.executable, str(HERE / "hostile_runner.py"), mode, str(canary), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent.parent), "BROWSER": "true"}
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
        check_bin(path)
    assert caught.value.exit_code == 4
    assert caught.value.message.startswith(f"{path}: data.pkl, byte {caught.value.position}: ")
    assert 0 <= caught.value.position < len(pickled)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", WRONG)
def test_the_refusal_is_the_right_one(name, ours):
    _, expected = WRONG[name]
    assert re.search(re.escape(expected) if name.startswith("name ") else expected, ours[0][name][1])


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
    assert check_bin(path) is None
