"""Every document that a command prints is described by a schema in ``manifests/``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from helpers.checkpoints import build_llama, llama_tensors
from helpers.documents import SCHEMAS, check_document

from aoconvert.documents import DOCUMENTS, json_schema

LEGACY = Path(__file__).parents[1] / "fixtures" / "legacy"

Call = Callable[..., Any]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_schemas_are_those_of_the_code(name: str) -> None:
    written = (SCHEMAS / f"{name}.v1.schema.json").read_text(encoding="utf-8")
    assert written == json_schema(name), "python -m aoconvert.documents"


def document(call: Call, *arguments: object, code: int = 0) -> Any:
    done = call(*arguments, "--json")
    assert done.code == code, done
    return json.loads(done.stdout)


def test_small_documents(call: Call) -> None:
    check_document("env", document(call, "env"))
    check_document("cache", document(call, "cache"))
    for row in document(call, "schemes"):
        check_document("scheme", row)
    check_document("error", document(call, "schemes", "nosuch", code=2))
    check_document("error", document(call, "plan", code=2))


def test_documents_of_a_conversion(call: Call, llama: Path, tmp_path: Path) -> None:
    convert = (llama, "--scheme", "int8wo", "--device", "cpu", "-o", tmp_path / "out")
    check_document("plan", document(call, "plan", *convert))
    check_document("error", document(call, "plan", *convert, "--skip", "nothing", code=3))
    check_document("quantize", document(call, "quantize", *convert))
    check_document("card", document(call, "card", tmp_path / "out"))
    check_document("card", document(call, "card", tmp_path / "out", "--write"))
    check_document("inspect", document(call, "inspect", tmp_path / "out"))
    check_document("inspect", document(call, "inspect", llama))
    check_document("verify", document(call, "verify", tmp_path / "out", "--no-reload"))


def test_documents_of_a_pipeline(call: Call, pipeline: Path, tmp_path: Path) -> None:
    options = ("--device", "cpu", "--min-quantized", 0)
    check_document("plan", document(call, "plan", pipeline, "--scheme", "int8wo", *options, "-o", tmp_path / "out"))
    int4 = ("--scheme", "int4wo", "--layout-device", "cpu", "--group-size", 32, "-o", tmp_path / "four")
    document(call, "quantize", pipeline, *int4, *options)
    check_document("repack", document(call, "repack", tmp_path / "four", "--layout-device", "cuda"))
    check_document("inspect", document(call, "inspect", tmp_path / "four"))


def test_document_of_a_migration(call: Call, tmp_path: Path) -> None:
    old = LEGACY / "diffusers-0.33.1-torchao-0.10.0" / "int8dq"
    found = document(call, "migrate", old, "-o", tmp_path / "out")
    check_document("migrate", found)
    assert found["tensors"] == {"carried": 16, "dequantized": 0, "requantized": 0, "unchanged": 20}
    said = call("migrate", old, "-o", tmp_path / "out", "--overwrite")
    assert (said.code, said.stderr) == (0, "")
    assert "int8dq by torchao 0.7 to 0.17 → int8dq" in said.stdout
    refused = call("migrate", tmp_path / "out", "-o", tmp_path / "again", "--json")
    assert (refused.code, refused.stderr) == (3, "")
    assert "nothing" in json.loads(refused.stdout)["error"]["message"]


def test_quiet_beside_json_silences_stderr_only(call: Call, tmp_path: Path) -> None:
    """A script that gives both still gets the whole document, or the error as one."""
    extra = {**llama_tensors(), "extra.bias": torch.zeros(3)}  # a warning
    source = build_llama(tmp_path / "model", tensors=extra)
    output, int4 = tmp_path / "out", ("--scheme", "int4wo", "--group-size", 32, "--layout-device", "cpu")
    done: list[tuple[str, int, tuple[object, ...]]] = [
        ("env", 0, ("env",)),
        ("cache", 0, ("cache",)),
        ("scheme", 0, ("schemes", "int8wo")),
        ("plan", 0, ("plan", source, *int4, "--device", "cpu", "-o", output)),
        ("quantize", 0, ("quantize", source, *int4, "--device", "cpu", "-o", output)),
        ("inspect", 0, ("inspect", output)),
        ("card", 0, ("card", output)),
        ("repack", 0, ("repack", output, "--layout-device", "cuda", "-o", tmp_path / "cuda")),
        ("verify", 0, ("verify", output, "--source", source, "--no-reload")),
        ("error", 3, ("quantize", source, *int4, "--device", "cpu", "-o", output)),
        ("error", 2, ("verify", output, "--source", tmp_path / "absent")),
        ("error", 2, ("verify", "--nosuch")),
    ]
    for name, code, arguments in done:
        said = call(*arguments, "-q", "--json")
        assert (said.code, said.stderr) == (code, ""), (arguments, said)
        check_document(name, json.loads(said.stdout))
    output.joinpath("config.json").write_text("{}")
    failed = call("verify", output, "--no-reload", "--json", "--quiet")
    assert (failed.code, failed.stderr) == (4, "")
    assert json.loads(failed.stdout)["ok"] is False


def test_a_key_that_is_not_described_is_seen() -> None:
    value = {"path": None, "bytes": 0, "kinds": [], "cleared": False}
    check_document("cache", value)
    with pytest.raises(jsonschema.ValidationError, match="'new' was unexpected"):
        check_document("cache", {**value, "new": 1})
    with pytest.raises(jsonschema.ValidationError, match="is a required property"):
        check_document("cache", {"path": None})
