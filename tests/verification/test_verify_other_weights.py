"""What a loader would take in place of the weights that were verified, or on top of them, is found and named."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from fake_hub.fixtures import HubClient
from forging import edit, forge, rewrite
from helpers import tiny  # noqa: F401  (its imports come first)
from safetensors.torch import save_file

import aoconvert
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.checkpoint import from_folder, from_manifest
from aoconvert.checkpoint.files import notes
from aoconvert.checkpoint.load_code import load_code
from aoconvert.checkpoint.manifest import REPORT_NAME
from aoconvert.checkpoint.report import Report
from aoconvert.cli.main import cli
from aoconvert.verification import loading, process
from aoconvert.verification.children import load_child, reload_child
from aoconvert.verification.original import resolve_original
from aoconvert.verification.verify import _write


@pytest.fixture(scope="module")
def result(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In three shards. Copied by whoever changes it."""
    out = tmp_path_factory.mktemp("other") / "out"
    aoconvert.quantize(checkpoints("llama-tied"), "int8wo", output=out, device="cpu", max_shard_size="12KB")
    return out


@pytest.fixture
def copy(result: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(result, tmp_path / "out"))


def own_weights(path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(32)}, path, {"format": "pt"})


def name_weights(name: str) -> Callable[[Path], None]:
    """config.json names the file that transformers is to load."""

    def change(out: Path) -> None:
        own_weights(out / name) if name.endswith("safetensors") else (out / name).write_bytes(b"")
        edit(out / "config.json", lambda values: values.update(transformers_weights=name))

    return change


def adapter(out: Path) -> None:
    (out / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    own_weights(out / "adapter_model.safetensors")


OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a named file": (name_weights("other.safetensors"), "config.json has transformers load 'other.safetensors'"),
    "an adapter's file": (name_weights("adapter_model.bin"), "config.json has transformers load 'adapter_model.bin'"),
    "a named index": (name_weights("other.safetensors.index.json"), "load 'other.safetensors.index.json'"),
    "an adapter": (adapter, "adapter_config.json is an adapter"),
    "safetensors": (lambda out: own_weights(out / "model.safetensors"), "model.safetensors would be loaded in place"),
    "an index": (lambda out: (out / "model.safetensors.index.json").write_text("{}"), "index.json would be loaded"),
    "a single file": (lambda out: (out / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin would be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("listed", [True, False])
def test_other_weights(name: str, listed: bool, copy: Path) -> None:
    """Whether a manifest vouches for them or there is none; an adapter that belongs to the model is only named."""
    change, says = OTHERS[name]
    change(copy)
    if listed:
        forge(copy)
    else:
        (copy / "aoconvert.json").unlink()
    if name == "an adapter" and listed:
        assert notes(copy) == ["adapter_config.json is an adapter, loaded on top where peft is installed"]
        return
    report = aoconvert.verify(copy, reload=False)
    assert not report.ok
    said = " ".join(check.detail for check in report.checks if check.status == "failed")
    # without a manifest our own reading may be led to the other file first
    assert says in said or (not listed and name in said + name and report.check("load") is None), said


def test_code_inside_the_checkpoint_is_named(copy: Path) -> None:
    for name, key in (("config.json", "AutoModel"), ("tokenizer_config.json", "AutoTokenizer")):
        (copy / name).touch()
        values = json.loads((copy / name).read_text() or "{}") | {"auto_map": {key: "own.Model"}}
        (copy / name).write_text(json.dumps(values))
    assert [line.split()[0] for line in notes(copy)] == ["config.json", "tokenizer_config.json"]
    assert all("names code inside the checkpoint (auto_map)" in line for line in notes(copy))


def reloaded_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The check ``reload`` by the child's own program in this process, without a forward pass."""
    known = (folder / "aoconvert.json").is_file()
    target = from_manifest(folder, manifests.load(folder)) if known else from_folder(folder)
    code = load_code(target, str(folder.resolve()), "from-pretrained", device="cpu")
    loaded = loading.Loaded()
    for part in target.parts:
        states = [torch.load(folder / file, weights_only=True) for file in part.files]
        loaded.tensors[part.name] = {k: load_child.describe(v) for state in states for k, v in state.items()}
    request = loading._request(target, code, {}, forward=False, example=None)
    said = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
    monkeypatch.setattr(sys, "__stdout__", said)
    reload_child.main()
    monkeypatch.undo()
    answers = [json.loads(line) for line in said.getvalue().splitlines() if line.startswith("{")]
    return loading._compare_reloaded(target, lambda: answers, loaded)


def shard_with(folder: Path, name: str) -> Path:
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    return folder / str(index["weight_map"][name])


def test_what_is_opened_is_what_the_files_hold(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, detail = reloaded_here(result, monkeypatch)
    assert (status, detail) == ("passed", "LlamaForCausalLM, 14 quantized tensors in place")


@pytest.mark.parametrize("known", [True, False])
def test_a_tensor_that_the_library_makes_anew(known: bool, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the model, with random values, and the library only warns."""
    name = "model.layers.0.input_layernorm.weight"
    rewrite(shard_with(copy, name), lambda state: state.pop(name))
    edit(copy / "pytorch_model.bin.index.json", lambda values: values["weight_map"].pop(name))
    forge(copy) if known else (copy / "aoconvert.json").unlink()
    with pytest.raises(loading.OtherWeights, match=f"{name} is in no file: the library initializes it"):
        reloaded_here(copy, monkeypatch)


def test_a_tensor_from_another_file(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index leads the library to a file that the manifest lists, but not among the weights."""
    name = "model.norm.weight"
    torch.save({name: torch.full((32,), 2.0, dtype=torch.bfloat16)}, copy / "training.bin")
    rewrite(shard_with(copy, name), lambda state: state)
    edit(copy / "pytorch_model.bin.index.json", lambda values: values["weight_map"].update({name: "training.bin"}))
    forge(copy)
    with pytest.raises(loading.OtherWeights, match=r"the library also opened training\.bin"):
        reloaded_here(copy, monkeypatch)


def test_a_source_that_is_not_there_is_refused_before_any_work(copy: Path) -> None:
    (copy / REPORT_NAME).write_text('{"ok": true}')
    done = CliRunner().invoke(cli, ["verify", str(copy), "--source", "./nope"], standalone_mode=False)
    assert isinstance(done.exception, aoconvert.UsageError)
    assert str(done.exception) == "--source: no such folder: './nope'"
    assert (copy / REPORT_NAME).read_text() == '{"ok": true}'


def test_nothing_to_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default folder is no question to the Hub."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["verify"], standalone_mode=False)
    assert isinstance(done.exception, aoconvert.UsageError)
    assert str(done.exception) == "no ./out here"


def test_a_report_that_cannot_be_written(copy: Path) -> None:
    values = dict.fromkeys(Report.model_fields)
    empty: dict[str, Any] = dict.fromkeys(("checks", "safe_globals", "imports", "ran", "forward"), ())
    known = {"schema_version": 1, "ok": True, "path": "out", "versions": {}, "date": "2026-01-01", "example": False}
    report = Report.model_validate({**values, **empty, **known, "manifest_sha256": "0" * 64})
    copy.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write anywhere
    try:
        said = _write(copy, report)
    finally:
        if user == 0:
            os.seteuid(0)
        copy.chmod(0o755)
    assert said == f"{REPORT_NAME} is not written: Permission denied"
    assert _write(copy, report) is None


def test_a_repo_is_taken_at_the_commit_that_was_quantized(hub_client: HubClient, copy: Path) -> None:
    state = hub_client.hub.state
    state.create_repo("user/llama")
    made = state.commit("user/llama", {"config.json": copy / "config.json"})
    later = state.commit("user/llama", {"more.txt": b"later"})
    forge(copy, lambda values: values["source"].update(kind="hub", repo_id="user/llama", revision=made))
    found = hub_client.run(
        "from pathlib import Path\n"
        f"from aoconvert.verification.original import {resolve_original.__name__} as resolve\n"
        f"folder = Path({str(copy)!r})\n"
        "references = [('user/llama', None), ('user/llama', 'main'), ('user/llama@main', None)]\n"
        "result = [resolve(name, folder, HubOptions(revision)).revision for name, revision in references]"
    )
    assert found == [made, later, later]


def test_interpreters_that_still_run_are_ended() -> None:
    said: list[str] = []

    def ask(children: process.Children) -> None:
        with pytest.raises(aoconvert.VerificationError) as error:
            children.ask("load_child", {"files": [], "imports": [], "safe_globals": None})
        said.append(str(error.value))

    with process.Children() as children:
        thread = threading.Thread(target=ask, args=(children,))
        thread.start()
        while not children._running:
            time.sleep(0.01)
    thread.join(timeout=60)
    assert said
    assert "signal 9" in said[0]
