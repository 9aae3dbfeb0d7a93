"""A model whose class is code inside its checkpoint: opened by the auto class, where somebody trusts that code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub.fixtures import HubClient
from helpers import tiny

import aoconvert
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.checkpoint import from_manifest
from aoconvert.checkpoint.load_code import load_code
from aoconvert.errors import SourceError, VerificationError
from aoconvert.sources import resolve
from aoconvert.verification.children import library_opening
from aoconvert.verification.library import originals


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A result whose class is in ``modeling_own.py``; importing that leaves ``canary``."""
    source = tmp_path / "source"
    tiny.llama(source)
    (source / "modeling_own.py").write_text(
        f"open({str(tmp_path / 'canary')!r}, 'w').close()\n"
        "from transformers import LlamaForCausalLM\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    config = json.loads((source / "config.json").read_text())
    config |= {
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    }
    (source / "config.json").write_text(json.dumps(config))
    aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu", trust_remote_code=True)
    (tmp_path / "canary").unlink()
    return tmp_path / "out"


def status(report: Any) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def test_where_it_is_trusted(own: Path) -> None:
    report = aoconvert.verify(own, trust_remote_code=True)
    assert report.ok and status(report)["reload"] == "passed", report.to_dict()
    assert (own.parent / "canary").exists()
    text = aoconvert.card(own, repo_id="me/x").text
    assert "from transformers import AutoModelForCausalLM\n" in text
    assert "AutoModelForCausalLM.from_pretrained('me/x', trust_remote_code=True)" in text
    assert "OwnForCausalLM.from_pretrained" not in text and "**Verified**" in text
    assert "runs that code on your machine" in text
    assert "aoconvert quantize ./source --scheme int8wo --device cpu --trust-remote-code" in text


def test_where_it_is_not_trusted(own: Path) -> None:
    with pytest.raises(VerificationError, match="code inside the checkpoint") as found:
        aoconvert.load(own)
    assert "trust_remote_code=True" in (found.value.hint or "")
    assert not (own.parent / "canary").exists()


@pytest.mark.exhaustive
def test_verify_where_it_is_not_trusted(own: Path) -> None:
    report = aoconvert.verify(own)
    assert report.ok
    assert (status(report)["reload"], status(report)["load"]) == ("skipped", "passed")
    assert not (own.parent / "canary").exists()
    assert "passed without opening the model (its class is code inside" in aoconvert.card(own).text
    model = aoconvert.load(own, trust_remote_code=True)
    assert tiny.tokens_step(model).isfinite().all()


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", ["from-pretrained", "assign"])
def test_from_the_hub(own: Path, hub_client: HubClient, strategy: str) -> None:
    aoconvert.verify(own, strategy=strategy, trust_remote_code=True)  # type: ignore[arg-type]
    hub_client.hub.state.create_repo("me/x")
    files = {path.relative_to(own).as_posix(): path for path in own.rglob("*") if path.is_file()}
    hub_client.hub.state.commit("me/x", files)
    done = hub_client.command("verify", "me/x", "--trust-remote-code", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["strategy"] == strategy, report


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"class_name": "pipeline"}, "wants to load"),
        ({"class_name": "AutoModel; import os"}, "wants to load"),
        ({"kwargs": {"trust_remote_code": "yes"}}, "wants to load"),
        ({"class_name": "AutoModelForCausalLM", "kwargs": {}}, "wants to load"),
    ],
)
def test_a_manifest_that_asks_for_more(own: Path, change: dict[str, Any], says: str) -> None:
    values = json.loads((own / "aoconvert.json").read_text())
    values["components"][0]["load"].update(change)
    with pytest.raises(SourceError, match=says):
        from_manifest(own, manifests.Manifest.model_validate(values))


def test_a_plain_model_runs_no_code(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """Trust that nothing needs leaves no trace."""
    out = tmp_path / "out"
    aoconvert.quantize(checkpoints("llama-tied"), "int8wo", output=out, device="cpu", trust_remote_code=True)
    target = from_manifest(out, manifests.load(out))
    assert not target.runs_code and "trust_remote_code" not in load_code(target, "x", "from-pretrained")


@pytest.mark.parametrize(
    "load",
    [
        {"kwargs": {"trust_remote_code": True}},
        {"class_name": "AutoModelForCausalLM", "kwargs": {"trust_remote_code": True}},
    ],
)
def test_trust_that_nothing_needs_is_not_asked_for(
    load: dict[str, Any], checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """A manifest wants it for a class of the library's own: no program, no card and no check has it then."""
    out = tmp_path / "out"
    aoconvert.quantize(checkpoints("llama-tied"), "int8wo", output=out, device="cpu")
    values = json.loads((out / "aoconvert.json").read_text())
    values["components"][0]["load"].update(load)
    target = from_manifest(out, manifests.Manifest.model_validate(values))
    [part] = target.parts
    assert not target.runs_code
    code = load_code(target, "x", "from-pretrained")
    assert "LlamaForCausalLM.from_pretrained('x')" in code
    assert "trust_remote_code" not in code + load_code(target, "x", "assign")
    [how] = originals(target, resolve(str(checkpoints("llama-tied"))), trust=False).values()
    assert library_opening.model_class(how)[1] == {}
    assert library_opening.model_class(how)[0].__name__ == part.class_name


def test_own_code_by_the_name_of_a_class_of_the_library(own: Path) -> None:
    """It is the checkpoint's code that the model was made with: where that must not run, nothing is compared."""
    for folder in (own, own.parent / "source"):
        config = json.loads((folder / "config.json").read_text())
        config |= {"architectures": ["LlamaForCausalLM"]}
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.LlamaForCausalLM"}
        (folder / "config.json").write_text(json.dumps(config))
    values = json.loads((own / "aoconvert.json").read_text())
    values["components"][0]["class_name"] = "LlamaForCausalLM"
    target = from_manifest(own, manifests.Manifest.model_validate(values))
    assert target.runs_code
    assert "AutoModelForCausalLM.from_pretrained('x', trust_remote_code=True)" in load_code(
        target, "x", "from-pretrained"
    )
    for trust in (False, True):
        [how] = originals(target, resolve(str(own.parent / "source")), trust=trust).values()
        if trust:
            found, options = library_opening.model_class(how)
            assert (found.__name__, options) == ("AutoModelForCausalLM", {"trust_remote_code": True})
        else:
            with pytest.raises(library_opening.OwnCode, match="only with --trust-remote-code"):
                library_opening.model_class(how)
    assert not (own.parent / "canary").exists()
