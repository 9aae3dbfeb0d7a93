"""Folders that somebody else made: every file damaged in every way, under every command that reads it.

What is asked: it ends soon, says in one line what is wrong or goes on where the library would, with the right exit
code; nothing outside the folder changes, and nothing that a terminal would obey reaches it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import build_llama, llama_tensors, shard

import aoconvert

JSON_FILES = ["config.json", "generation_config.json", "model.safetensors.index.json"]
RESULT_FILES = ["aoconvert.json", "aoconvert.verify.json", "config.json", "README.md"]


def digits(text: str) -> str:
    return text.replace("{", '{"absurd": ' + "9" * 5000 + ",", 1)


def key(name: str) -> Callable[[str], str]:
    return lambda text: text.replace("{", f'{{"{name}": 1,', 1)


def value(word: str) -> Callable[[str], str]:
    """Every number becomes it."""
    return lambda text: re.sub(r"(?<=: )-?[0-9]+(\.[0-9]+)?(?=[,\n}])", word, text)


CONTENTS: dict[str, Callable[[str], str | bytes]] = {
    "empty": lambda text: "",
    "a number of 5,000 digits": digits,
    "numbers of 5,000 digits": value("9" * 5000),
    "numbers of 90 digits": value("9" * 90),
    "negative numbers": value("-1"),
    "NaN": value("NaN"),
    "Infinity": value("Infinity"),
    "null for numbers": value("null"),
    "lists for numbers": value("[[]]"),
    "text for numbers": value('"a"'),
    "keys twice": lambda text: text.replace("{", "{" + text.strip()[1:-1] + ",", 1) if text.strip()[:1] == "{" else "",
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "half a surrogate pair": key("\\ud800"),
    "escapes": key("\\u001b[31mred\\u202e"),
    "deep": lambda text: '{"a":' * 2000 + "1" + "}" * 2000,
    "deep inside": lambda text: text.replace("{", '{"deep": ' + "[" * 900 + "]" * 900 + ",", 1),
    "a long key": key("k" * 200_000),
    "a list": lambda text: "[]",
    "a number": lambda text: "7",
    "a string": lambda text: '"x"',
    "null": lambda text: "null",
    "cut short": lambda text: text[: len(text) // 2],
    "zeros": lambda text: bytes(100),
    "20 MB": lambda text: text + " " * (20 << 20),
}


def fifo(path: Path, elsewhere: Path) -> None:
    os.mkfifo(path)


def folder(path: Path, elsewhere: Path) -> None:
    path.mkdir()


def device(path: Path, elsewhere: Path) -> None:
    path.symlink_to("/dev/zero")


def broken_link(path: Path, elsewhere: Path) -> None:
    path.symlink_to("nowhere")


def link_out(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere)


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "fifo": fifo,
    "folder": folder,
    "device": device,
    "broken link": broken_link,
    "link to a file elsewhere": link_out,
}
DAMAGES = [*CONTENTS, *KINDS]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sharded model."""
    made = build_llama(tmp_path_factory.mktemp("hostile") / "model")
    shard(made, "model")
    (made / "generation_config.json").write_text('{\n "eos_token_id": 2,\n "max_length": 20\n}')
    return made


@pytest.fixture(scope="module")
def result(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``quantize`` made of it, with a report that nobody checked."""
    made = tmp_path_factory.mktemp("hostile") / "result"
    aoconvert.quantize(source, "int8wo", output=made, device="cpu", min_quantized=0.0)
    digest = hashlib.sha256((made / "aoconvert.json").read_bytes()).hexdigest()
    report = {
        **dict.fromkeys(("strategy", "torchao", "torch", "python", "device", "code_sha256", "published")),
        **dict.fromkeys(("checks", "safe_globals", "imports", "ran", "forward"), ()),
        "schema_version": 1,
        "ok": True,
        "path": "out",
        "versions": {},
        "example": False,
        "manifest_sha256": digest,
        "date": "2026-01-01T00:00:00+00:00",
    }
    (made / "aoconvert.verify.json").write_text(json.dumps(report, indent=1))
    (made / "README.md").write_text("---\nlicense: mit\n---\n# a card\n")
    return made


@pytest.fixture
def attempt(call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # a library's handler may hold another test's stderr

    def run(original: Path, file: str, damage: str, *command: str) -> Any:
        place = tmp_path / "folder"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(original, place)
        precious = tmp_path / "precious"
        precious.write_text("precious")
        path = place / file
        text, data = content_of(path)
        path.unlink(missing_ok=True)
        if damage in CONTENTS:
            made = CONTENTS[damage](text)
            content = made if isinstance(made, bytes) else made.encode()
            path.write_bytes(content if data is None else len(content).to_bytes(8, "little") + content + data)
        else:
            KINDS[damage](path, precious)
        places = {"FOLDER": str(place), "OUT": str(tmp_path / "out")}
        done = call(*(places.get(word, word) for word in command))
        where = f"{' '.join(command)} with {file}: {damage}\n{done.stderr}{done.stdout[:2000]}"
        assert precious.read_text() == "precious", where
        assert done.code in (0, 1, 3, 4, 5), where
        for written in (done.stdout, done.stderr):
            assert "unexpected" not in written, where
            assert "Traceback" not in written, where
            assert all(line.isprintable() for line in written.split("\n")), where
        if done.code in (1, 3) and "--json" not in command:
            assert done.stderr.startswith("error: "), where
            assert len(done.stderr) < 5000, where
        if "--json" in command:
            json.loads(done.stdout)
        return done

    return run


def content_of(path: Path) -> tuple[str, bytes | None]:
    """The text of a file, or of a safetensors header and what lies behind it."""
    if path.suffix != ".safetensors":
        return path.read_text() if path.is_file() else "{\n}", None
    content = path.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    return json.dumps(json.loads(content[8:stop]), indent=1), content[stop:]


def covering(files: list[str], commands: list[tuple[str, ...]], every: int = 1) -> list[Any]:
    """Every damage of every file under every command; by default pairs of damage and file once, or one of ``every``."""
    return [
        pytest.param(
            file,
            damage,
            command,
            marks=[]
            if (number + at) % len(commands) == order and (number + 7 * at) % every == 0
            else pytest.mark.exhaustive,
        )
        for at, file in enumerate(files)
        for number, damage in enumerate(DAMAGES)
        for order, command in enumerate(commands)
    ]


PLAN = ("plan", "FOLDER", "--scheme", "int8wo", "--device", "cpu", "--min-quantized", "0")


@pytest.mark.parametrize(
    ("file", "damage", "command"),
    covering(JSON_FILES, [("inspect", "FOLDER"), PLAN, ("inspect", "FOLDER", "--json"), (*PLAN, "--json")]),
)
def test_a_source(file: str, damage: str, command: tuple[str, ...], source: Path, attempt: Callable[..., Any]) -> None:
    attempt(source, file, damage, *command)


@pytest.mark.parametrize(
    ("file", "damage", "command"),
    covering(RESULT_FILES, [("card", "FOLDER"), ("inspect", "FOLDER"), ("push", "me/model", "FOLDER", "--dry-run")]),
)
def test_a_result(file: str, damage: str, command: tuple[str, ...], result: Path, attempt: Callable[..., Any]) -> None:
    attempt(result, file, damage, *command)


PIPELINE_FILES = [
    *("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json", "vae/config.json"),
    *("transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
]
QUANTIZE = ("quantize", "FOLDER", "--scheme", "int8wo", "--device", "cpu", "--min-quantized", "0", "-o", "OUT", "-q")


@pytest.mark.parametrize(
    ("file", "damage", "command"),
    covering(PIPELINE_FILES, [("inspect", "FOLDER"), PLAN, ("verify", "FOLDER"), QUANTIZE, ("card", "FOLDER")], 29),
)
def test_a_pipeline(
    file: str, damage: str, command: tuple[str, ...], pipeline: Path, tmp_path: Path, attempt: Callable[..., Any]
) -> None:
    done = attempt(pipeline, file, damage, *command)
    left = {path.name for path in tmp_path.iterdir()} - {"folder", "precious"}
    assert left == ({"out"} if command == QUANTIZE and done.code == 0 else set())


@pytest.mark.parametrize(
    ("file", "damage", "command"),
    covering(["model-00001-of-00002.safetensors"], [("inspect", "FOLDER"), QUANTIZE, ("push", "a/b", "FOLDER")], 15),
)
def test_a_header(file: str, damage: str, command: tuple[str, ...], source: Path, attempt: Callable[..., Any]) -> None:
    attempt(source, file, damage, *command)


@pytest.fixture(scope="module")
def foreign(result: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torchao checkpoint that no manifest speaks of."""
    made = tmp_path_factory.mktemp("hostile") / "foreign"
    shutil.copytree(result, made, ignore=shutil.ignore_patterns("aoconvert*"))
    return made


@pytest.mark.parametrize(
    ("file", "damage", "command"),
    covering(
        ["config.json", "pytorch_model.bin.index.json"],
        [
            ("verify", "FOLDER", "--no-reload"),
            ("inspect", "FOLDER"),
            PLAN,
            ("verify", "FOLDER", "--no-reload", "--json"),
        ],
        15,
    ),
)
def test_a_checkpoint_by_others(
    file: str, damage: str, command: tuple[str, ...], foreign: Path, attempt: Callable[..., Any]
) -> None:
    attempt(foreign, file, damage, *command)


@pytest.mark.parametrize(
    "damage", [pytest.param(d, marks=[] if at % 7 == 0 else pytest.mark.exhaustive) for at, d in enumerate(DAMAGES)]
)
def test_verify_of_a_damaged_manifest(damage: str, result: Path, attempt: Callable[..., Any]) -> None:
    done = attempt(result, "aoconvert.json", damage, "verify", "FOLDER", "--no-forward")
    assert done.code in (1, 3, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_command_writes_into_a_folder(
    kind: str, result: Path, tmp_path: Path, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report and the card take a link's place; a FIFO, a folder and a device's node stay."""
    place, other, precious = tmp_path / "folder", tmp_path / "other", tmp_path / "precious"
    shutil.copytree(result, place)
    shutil.copytree(result, other)
    manifest = json.loads((place / "aoconvert.json").read_text())
    manifest["run"]["digest"] = "0" * 64  # so that verify ends early
    (place / "aoconvert.json").write_text(json.dumps(manifest))
    precious.write_text("precious")
    for name, command in {
        "aoconvert.verify.json": ["verify", place],
        "README.md": ["card", other, "--write", "--overwrite"],
    }.items():
        folder = Path(command[1])
        (folder / name).unlink()
        KINDS[kind](folder / name, precious)
        done = call(*command)
        assert "unexpected" not in done.stderr
        assert precious.read_text() == "precious"
        assert not (tmp_path / "nowhere").exists()
        assert not (folder / "nowhere").exists()
        replaced = kind in ("device", "broken link", "link to a file elsewhere")
        if replaced:
            assert done.code == (4 if command[0] == "verify" else 0), done.stderr
            assert not (folder / name).is_symlink()
        else:
            assert done.code == 1
            assert done.stderr.endswith(f"error: {folder / name}: is not a regular file\n")
        (folder / name).rmdir() if kind == "folder" else (folder / name).unlink()
        (folder / name).write_text("{}")


@pytest.mark.parametrize("name", ["aoconvert.lock", "aoconvert.journal", "aoconvert.journal.new"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_where_a_run_works(
    name: str, kind: str, source: Path, tmp_path: Path, call: Callable[..., Any]
) -> None:
    precious, partial = tmp_path / "precious", tmp_path / ".out.aoconvert-partial"
    precious.write_text("precious")
    partial.mkdir()
    KINDS[kind](partial / name, precious)
    done = call("quantize", source, "--scheme", "int8wo", "-o", tmp_path / "out", "--min-quantized", "0", "--quiet")
    assert precious.read_text() == "precious"
    assert not (partial / "nowhere").exists()
    if done.code:
        assert (kind, done.code) == ("folder", 3), done.stderr
        assert f"{partial} holds files that aoconvert did not write: {name}/ (move it away)" in done.stderr
        assert (partial / name).is_dir()
        assert "unexpected" not in done.stderr
        return
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "precious"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink() or not path.is_file()]


EVIL = "evil\x1b[31m\x07\x9b\u202e\u2066\x7f"


@pytest.mark.parametrize("command", ["inspect", "plan"])
@pytest.mark.parametrize("mode", [(), ("--json",), ("--quiet",)])
def test_names_are_shown_as_their_escapes(
    command: str, mode: tuple[str, ...], tmp_path: Path, call: Callable[..., Any]
) -> None:
    model = build_llama(tmp_path / "model", tensors={**llama_tensors(), f"{EVIL}.weight": torch.zeros(2, 2)})
    options = ["--scheme", "int8wo", "--device", "cpu", "--min-quantized", "0"] if command == "plan" else []
    done = call(command, model, *options, *mode)
    assert "unexpected" not in done.stderr
    for written in (done.stdout, done.stderr):
        assert all(line.isprintable() for line in written.split("\n")), written
    if mode == ("--json",):
        json.loads(done.stdout)


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_drawn_keeps_its_own_colors_only(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.table import Table

    from aoconvert.cli import output

    monkeypatch.setattr(output, "is_terminal", lambda stream: terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    table = Table("name", style="bold")
    table.add_row(EVIL)
    output.Output("human").result(lambda: table, {}, "")
    written = capsys.readouterr().out
    assert "\\x1b[31m" in written
    assert "\x1b[31m" not in written
    assert ("\x1b[" in written) == terminal
    assert not set(written) & set("\x07\x9b\u202e\u2066\x7f")
