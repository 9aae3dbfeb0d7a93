"""Every family's card: front matter the Hub takes, code that compiles, claims only where they were proven."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from editing import REPO, edit
from reading import read

import aoconvert
from aoconvert import cards
from aoconvert.cards import CardOptions, render
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.checkpoint import from_manifest
from aoconvert.checkpoint.load_code import load_code
from aoconvert.checkpoint.usage import usage_code
from aoconvert.errors import SourceError, UsageError

# family → what its example makes
USES = {
    "cogvideox": "export_to_video",
    "flux": "image.save",
    "pixart": "image.save",
    "sd3": "image.save",
    "wan": "export_to_video",
    "llama-chat": "apply_chat_template",
    "t5-tokenizer": "embeddings",
    "bert": "embeddings",
}
HEADINGS = ["Use", "Size and error", "What is quantized", "Limits", "Verification", "Provenance"]


@pytest.mark.parametrize("family", USES)
def test_every_family(family: str, converted: Any) -> None:
    folder = converted(family)
    card = render(folder, CardOptions(), repo_id=REPO)
    page = read(card.text)
    assert page.headings == ["h1 tiny-int8wo", *(f"h2 {name}" for name in HEADINGS)]
    assert {"torchao", "int8wo", "aoconvert"} <= set(page.front["tags"])
    load, usage = page.fences("python")
    for code in (load, usage):
        compile(code, "<card>", "exec")
    assert f"from_pretrained('{REPO}'" in load
    assert USES[family] in usage
    assert "Not verified." in page.shown and "No verification has been run." in page.shown
    install = page.fences("bash")[0]
    uses_diffusers = family in ("cogvideox", "flux", "pixart", "sd3", "wan")
    assert re.match(r"pip install torchao==[\d.]+ torch==[\d.]+ ", install)
    assert ("diffusers==" in install) == uses_diffusers and "transformers==" in install
    assert ("bot of the Hub" in page.shown) == (not uses_diffusers)
    for word in ("to be filled", "{{", "None", "Undefined", "nan "):
        assert word not in card.text
    assert card.picture is not None and "![" in page.body


@pytest.mark.parametrize("family", ["cogvideox", "llama-chat"])
def test_the_code_on_the_card_is_what_verify_ran(
    family: str, verified: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, with the place replaced; what verify sent to its child process is recorded on the way."""
    from aoconvert.verification import loading, process

    folder = verified(family)
    page = read(render(folder, CardOptions(), repo_id=REPO).text)
    assert "Verified on " in page.shown and "Not verified" not in page.shown
    assert f"plain {'diffusers' if family == 'cogvideox' else 'transformers'} opens it" in page.shown
    assert "and the example at its smallest sizes" in page.shown
    load, usage = page.fences("python")
    sent: list[dict[str, Any]] = []

    def record(self: process.Children, child: str, request: dict[str, Any], **limits: Any) -> Any:
        sent.append(request)
        raise aoconvert.VerificationError("seen")

    monkeypatch.setattr(process.Children, "ask", record)
    copy = Path(shutil.copytree(folder, tmp_path / "out"))
    target = from_manifest(copy, manifests.load(copy))
    from aoconvert.verification.verify import VerifyOptions, _reload, _Run  # what verify does, without the process

    run = _Run(copy, "", VerifyOptions(example=True), aoconvert.progress.Silent())
    _reload(run, target, loading.Loaded(), process.Children())
    ran = sent[0]
    automatic = '"cuda" if torch.cuda.is_available() else "cpu"'
    assert load.replace(REPO, str(copy.resolve())).replace(automatic, "'cpu'") == ran["code"]
    small = usage_code(target, REPO, small=True)
    assert small is not None
    assert small.replace(REPO, str(copy.resolve())) == ran["example"]
    # the example on the card is the one that ran, but for its sizes
    for line, ran_line in zip(usage.splitlines(), small.splitlines(), strict=True):
        assert line == ran_line or re.match(r"(frames|tokens) = ", line)


def test_the_claim_needs_this_very_code(verified: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(verified("cogvideox"), tmp_path / "out"))
    path = folder / "aoconvert.verify.json"
    report = json.loads(path.read_text())
    assert "Verified on" in read(render(folder, CardOptions()).text).shown

    def shown(**changes: Any) -> str:
        path.write_text(json.dumps({**report, **changes}))
        text = read(render(folder, CardOptions()).text).shown
        assert "Verified on" not in text and "Not verified." in text
        return text

    digest = report["code_sha256"]
    other = ("0" if digest[0] != "0" else "1") + digest[1:]
    assert "different code" in shown(code_sha256=other)
    assert "different code" in shown(code_sha256=None)
    assert "another conversion" in shown(manifest_sha256="0" * 64)
    assert "without opening" in shown(strategy=None)
    assert "verification failed" in shown(ok=False)
    checks = [{**check, "status": "failed"} if check["name"] == "numbers" else check for check in report["checks"]]
    text = shown(checks=checks)
    assert "The verification failed: numbers." in text
    skipped = [{**check, "status": "skipped"} if check["name"] == "reload" else check for check in report["checks"]]
    assert "without opening" in shown(checks=skipped)
    assert "cannot be read" in shown(strategy="exec")
    path.write_text("{")
    assert "cannot be read" in read(render(folder, CardOptions()).text).shown


def test_each_claim_has_its_record(verified: Any, tmp_path: Path) -> None:
    """Without the record of what ran, on this device and of this very code, the claim is not there."""
    folder = Path(shutil.copytree(verified("cogvideox"), tmp_path / "out"))
    path = folder / "aoconvert.verify.json"
    report = json.loads(path.read_text())
    assert {item["what"]: item["device"] for item in report["ran"]} == dict.fromkeys(
        ("load", "forward", "example"), "cpu"
    )
    assert [item["inputs"] for item in report["ran"]] == [None, {"transformer": "pipeline"}, None]
    example, forward = "the example at its smallest sizes", "A forward pass succeeded"

    def shown(**changes: Any) -> str:
        path.write_text(json.dumps({**report, **changes}))
        return read(render(folder, CardOptions()).text).shown

    def without(what: str, **changes: Any) -> list[dict[str, Any]]:
        return [{**item, **changes} if item["what"] == what else item for item in report["ran"]]

    whole = shown()
    assert example in whole and forward in whole and "was not run" not in whole and "Device cpu, " in whole
    for changes in ({"code_sha256": "0" * 64}, {"code_sha256": None}, {"device": "cuda"}):
        assert example not in shown(ran=without("example", **changes))
        assert forward not in shown(ran=without("forward", **changes))
        assert "does not say where this code ran" in shown(ran=without("load", **changes))
    assert example not in shown(example=False)
    text = shown(ran=[])
    assert example not in text and forward not in text and "Verified on" in text
    assert "Verified" not in shown(device=None, code_sha256=None).replace("Not verified", "")
    # versions are those of the report, and so are the pins
    versions = {**report["versions"], "diffusers": "0.99.0"}
    assert "diffusers 0.99.0" in shown(versions=versions).partition("Provenance")[0]
    assert "diffusers==0.99.0" in read(render(folder, CardOptions()).text).fences("bash")[0]
    path.unlink()
    text = read(render(folder, CardOptions()).text).shown
    for claim in (example, forward, "Verified on", "opens it", "arrived", "Device "):
        assert claim not in text, claim


def test_a_sharded_pipeline_shows_the_way_that_works(checkpoints: Any, tmp_path: Path) -> None:
    """diffusers cannot open its shards (diffusers#14811); the manifest of a test says so, as verify would."""
    out = tmp_path / "out"
    aoconvert.quantize(checkpoints("cogvideox"), "int8wo", output=out, device="cpu", max_shard_size="1MB")
    edit(out, lambda values: values["components"][0]["load"].update(strategy="assign"))
    page = read(render(out, CardOptions(), repo_id=REPO).text)
    target = from_manifest(out, manifests.load(out))
    [load, _] = page.fences("python")
    assert load == load_code(target, REPO, "assign", hub=True)
    assert f"snapshot_download('{REPO}')" in load
    assert "alone does not open this checkpoint" in page.shown
    assert "and plain diffusers opens it" not in page.shown


def test_front_matter_takes_over_what_holds(converted: Any) -> None:
    card = render(converted("llama-chat"), CardOptions())
    front = read(card.text).front
    assert front == {
        "language": ["en", "no"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "tiny-terms",
        "license_link": "https://example.com/terms",
        "pipeline_tag": "text-generation",
        "tags": ["conversational", "arxiv:2403.04692", "torchao", "int8wo", "aoconvert"],
    }
    assert card.warnings == ()
    assert "https://example.com/terms" in read(card.text).links


def test_the_base_model_is_linked(pipeline: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    edit(pipeline, lambda values: values["source"].update(kind="hub", repo_id="zai-org/CogVideoX-2b", revision=commit))
    page = read(render(pipeline, CardOptions()).text)
    assert page.front["base_model"] == "zai-org/CogVideoX-2b"
    assert page.front["base_model_relation"] == "quantized"
    assert page.headings[0] == "h1 CogVideoX-2b int8wo"
    assert f"https://huggingface.co/zai-org/CogVideoX-2b/tree/{commit}" in page.links


def test_an_unknown_licence_is_left_out_and_said(pipeline: Path) -> None:
    card = render(pipeline, CardOptions())
    assert "license" not in read(card.text).front
    assert "the licence is unknown" in card.warnings[0]


def test_the_same_bytes_again(converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = converted("flux")
    first = render(folder, CardOptions(), repo_id=REPO)
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert render(Path(copy), CardOptions(), repo_id=REPO) == first


@pytest.mark.parametrize(
    ("scheme", "true", "false"),
    [
        ("float8wo", "a forward pass fails", "silently leaves"),
        ("intx4wo", "a whole byte", "torch.float32"),
        ("int8dq", "activations too", "a whole byte"),
    ],
)
def test_limits_that_are_true(scheme: str, true: str, false: str, converted: Any) -> None:
    shown = read(render(converted(f"bert:{scheme}"), CardOptions()).text).shown
    assert true in shown
    assert false not in shown


def test_casting_is_as_the_card_says() -> None:
    import torch
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    for config, works in ((Int8WeightOnlyConfig(version=2), True), (Float8WeightOnlyConfig(), False)):
        model = torch.nn.Sequential(torch.nn.Linear(64, 64)).bfloat16()
        quantize_(model, config)
        model.to(torch.float32)
        assert model[0].weight.dtype == torch.bfloat16
        if works:
            model(torch.randn(2, 64))
        else:
            with pytest.raises(RuntimeError, match="dtype"):
                model(torch.randn(2, 64))


def test_two_thousand_tensors_are_a_short_card(pipeline: Path) -> None:
    def multiply(values: dict[str, Any]) -> None:
        part = values["components"][0]
        block = [t for t in part["tensors"] if t["name"].startswith("transformer_blocks.0.")]
        for number in range(4, 80):
            for tensor in block:
                sqnr = tensor["sqnr_db"] and tensor["sqnr_db"] - number / 10
                name = tensor["name"].replace("blocks.0.", f"blocks.{number}.")
                part["tensors"].append({**tensor, "name": name, "sqnr_db": sqnr})
        assert len(part["tensors"]) > 1900

    short = render(pipeline, CardOptions())
    edit(pipeline, multiply)
    card = render(pipeline, CardOptions())
    page = read(card.text)
    assert "`transformer_blocks.*.attn1.to_q` | 80 |" in page.body
    assert "transformer_blocks.79.ff.net.2" in page.shown  # the worst
    assert len(card.text) < 1.1 * len(short.text)
    assert card.picture is not None and len(card.picture) < 30_000


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no aoconvert\.json"):
        render(tmp_path, CardOptions())


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "user/x'); import os", "../x", "user/na me", "user/x\n"])
def test_a_repo_id_that_is_none(repo_id: str, pipeline: Path) -> None:
    with pytest.raises(UsageError, match="is not a valid repo id"):
        render(pipeline, CardOptions(), repo_id=repo_id)


def test_an_edited_card_is_seen(pipeline: Path) -> None:
    assert not cards.is_edited(pipeline)  # there is none
    paths = cards.write(pipeline, render(pipeline, CardOptions()))
    assert [path.name for path in paths] == ["sqnr.svg", "README.md"]
    readme = pipeline / "README.md"
    text = readme.read_text()
    assert not cards.is_edited(pipeline)
    readme.write_bytes(text.replace("\n", "\r\n").encode())  # as git may check it out
    assert not cards.is_edited(pipeline)
    for changed in (
        text.replace("int8", "int4", 1),
        text + "more",
        text[:-90],
        "# mine",
        "",
        text.replace("sha256", ""),
    ):
        readme.write_text(changed)
        assert cards.is_edited(pipeline), changed[-200:]


def test_the_public_function(pipeline: Path) -> None:
    card = aoconvert.card(str(pipeline), repo_id=REPO, license="mit", metadata={"language": ["en"]})
    front = read(card.text).front
    assert (front["license"], front["language"]) == ("mit", ["en"])
    assert ast.parse(read(card.text).fences("python")[0])
