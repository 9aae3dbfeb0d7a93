"""A push into a repo that holds something already: another model, or what somebody else put there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pushing import Pusher, entries, problem

from aoconvert import cards
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.files import check_files
from aoconvert.checkpoint.manifest import Manifest
from aoconvert.hub.identity import other_config, other_model, other_schemes

Fresh = Callable[..., Path]
Values = dict[str, Any]


def value(outcome: dict[str, Any]) -> dict[str, Any]:
    assert "value" in outcome, outcome
    found: dict[str, Any] = outcome["value"]
    return found


def edit(folder: Path, change: Callable[[Values], None]) -> Path:
    """Change the manifest as its writer could have written it."""
    values = json.loads((folder / "aoconvert.json").read_text())
    change(values)
    (folder / "aoconvert.json").write_text(manifests.dump(Manifest.model_validate(values)))
    return folder


def wider(values: Values) -> None:
    values["components"][0]["tensors"][3]["shape"][0] += 8


def from_repo(name: str) -> Callable[[Values], None]:
    return lambda values: values["source"].update(kind="hub", repo_id=name, revision="0" * 40)


# --- another model


def test_another_model_of_aoconvert_stays(me: Pusher, fresh: Fresh) -> None:
    value(me.push(fresh("pipeline"), "me/pipe"))
    me.hub.state.commit("me/pipe", {"samples/a.txt": b"mine", "notes.md": b"mine", "b.png": b"\0"})
    before = entries(me.hub, "me/pipe")
    folder = fresh()
    for options in ({}, {"dry_run": True}, {"create_pr": True}):
        refused = problem(me.push(folder, "me/pipe", **options), 5)
        assert "me/pipe holds another model: a pipeline, and this is a model (--replace" in refused["message"]
    assert entries(me.hub, "me/pipe") == before
    done = value(me.push(folder, "me/pipe", replace=True))
    found = entries(me.hub, "me/pipe")
    assert set(found) == {file["path"] for file in done["files"]} | {
        *(".gitattributes", "samples/a.txt", "notes.md", "b.png"),
    }
    assert set(done["deleted"]) == set(before) - set(found)
    for path in (".gitattributes", "samples/a.txt", "notes.md", "b.png"):
        assert found[path] == before[path]


@pytest.mark.parametrize(
    ("there", "here", "says"),
    [
        (wider, None, "another OPTForCausalLM: its "),
        (from_repo("a/x"), from_repo("a/y"), "one made from a/x, and this one is made from a/y"),
        (from_repo("a/x"), wider, "another OPTForCausalLM: its "),
        (from_repo("a/x"), from_repo("A/X"), None),
        (from_repo("a/x"), None, None),
    ],
)
def test_what_is_another_model(me: Pusher, fresh: Fresh, there: Any, here: Any, says: str | None) -> None:
    first, second = fresh("older"), fresh()
    for folder, change in ((first, there), (second, here)):
        if change is not None:
            edit(folder, change)
    value(me.push(first, "me/same", allow_unverified=True))
    outcome = me.push(second, "me/same", allow_unverified=True)
    if says is None:
        assert value(outcome)["deleted"] == ["pytorch_model.bin"]
    else:
        assert says in problem(outcome, 5)["message"]
        assert "pytorch_model.bin" in entries(me.hub, "me/same")


def test_another_scheme_is_an_update_and_is_said(me: Pusher, fresh: Fresh) -> None:
    value(me.push(edit(fresh("older"), lambda values: values["components"][0].update(scheme="int4wo")), "me/scheme",
                  allow_unverified=True))  # fmt: skip
    done = value(me.push(fresh(), "me/scheme"))
    assert "me/scheme: int4wo there before, int8wo now" in done["warnings"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"config.json": b'{"architectures": ["BertModel"]}'}, "a BertModel, and this is an OPTForCausalLM"),
        ({"model_index.json": b'{"_class_name": "FluxPipeline"}'}, "a FluxPipeline, and this is an OPTForCausalLM"),
        ({"config.json": b'{"architectures": ["OPTForCausalLM"]}'}, "changed there since: config.json"),
        ({"config.json": b"not JSON"}, "holds another model: a model of an unknown class"),
        ({"pytorch_model-00001-of-00002.bin": b"theirs"}, "changed there since: pytorch_model-00001-of-00002.bin"),
        ({"aoconvert.json": b"{}"}, "changed there since: aoconvert.json"),
        ({"README.md": b"---\nlicense: mit\n---\n# My model\n"}, "changed there since: README.md"),
        ({"README.md": b"---\nlicense: mit\n---\n"}, None),
        ({"notes.md": b"x", "original/model.bin": b"x", "sample.mp4": b"x", ".gitattributes": b"*.x -text"}, None),
    ],
)
def test_what_somebody_else_put_there(me: Pusher, fresh: Fresh, files: dict[str, bytes], says: str | None) -> None:
    state, folder = me.hub.state, fresh()
    state.create_repo("me/theirs", initial_commit=True)
    state.commit("me/theirs", files)
    outcome = me.push(folder, "me/theirs")
    if says is not None:
        assert says in problem(outcome, 5)["message"]
        assert all(state.read("me/theirs", path) == content for path, content in files.items())
        outcome = me.push(folder, "me/theirs", replace=True)
    done = value(outcome)
    assert done["deleted"] == []
    said = " ".join(done["warnings"])
    assert ("front matter and no text: it is replaced" in said) == (files.get("README.md", b"")[-4:] == b"---\n")
    assert ("replaces another model" in said) == (says is not None and ("this is a" in says or "unknown class" in says))
    kept = set(files) - {file["path"] for file in outcome["value"]["files"]}
    assert all(state.read("me/theirs", path) == files[path] for path in kept)


@pytest.mark.parametrize(
    ("path", "vouched"),
    [
        *((path, True) for path in ("notes.md", "samples/a.txt", "sample.wav", "docs/x/y.json", "b.ipynb", "a.webm")),
        *(
            (path, False)
            for path in ("notes.txt", "extra.json", "x/samples/a.txt", "samples/model.safetensors", "a.py")
        ),
    ],
)
def test_notes_and_samples_of_others_do_not_fail_a_verification(path: str, vouched: bool, fresh: Fresh) -> None:
    """What a loader could read does."""
    folder = fresh("older")
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(b"x")
    problems, _ = check_files(folder, manifests.load(folder))
    assert problems == ([] if vouched else [f"{path} is not in the manifest"])


# --- what was changed there since


def test_a_card_that_was_edited_on_the_hub_stays(me: Pusher, fresh: Fresh) -> None:
    state, folder = me.hub.state, fresh("older")
    value(me.push(folder, "me/card"))
    edited = state.read("me/card", "README.md") + b"\nMine.\n"
    state.commit("me/card", {"README.md": edited})
    other = fresh()
    for source in (folder, other):
        assert "changed there since: README.md" in problem(me.push(source, "me/card"), 5)["message"]
        assert state.read("me/card", "README.md") == edited
    # its author has it in the folder
    (other / "README.md").write_bytes(edited + b"More.\n")
    value(me.push(other, "me/card"))
    assert state.read("me/card", "README.md").endswith(b"More.\n")


@pytest.mark.parametrize("path", ["config.json", "pytorch_model.bin"])
def test_a_file_that_was_changed_on_the_hub_stays(me: Pusher, fresh: Fresh, path: str) -> None:
    state, folder = me.hub.state, fresh("older")
    value(me.push(folder, "me/changed"))
    content = bytearray(state.read("me/changed", path))
    content[-2] ^= 1  # the same size
    state.commit("me/changed", {path: bytes(content)})
    assert f"changed there since: {path}" in problem(me.push(folder, "me/changed"), 5)["message"]
    refused = problem(me.push(fresh(), "me/changed"), 5)  # in shards: config.json again, and no other weights
    assert path in refused["message"] and "--replace" in refused["message"]
    assert state.read("me/changed", path) == content
    value(me.push(folder, "me/changed", replace=True))
    assert state.read("me/changed", path) == (folder / path).read_bytes()


# --- the same model?


@pytest.fixture
def pipeline(checkpoint: Callable[[str], Path]) -> Manifest:
    return manifests.load(checkpoint("pipeline"))


def test_pipelines_with_other_components_quantized(pipeline: Manifest) -> None:
    [part] = pipeline.components
    encoder = part.model_copy(update={"name": "text_encoder", "class_name": "T5EncoderModel"})
    both = pipeline.model_copy(update={"components": [part, encoder]})
    alone = pipeline.model_copy(update={"components": [encoder]})
    assert other_model(both, pipeline) is None
    assert "nothing shows that they are the same" in str(other_model(alone, pipeline))
    named = pipeline.source.model_copy(update={"repo_id": "a/b"})
    assert other_model(*(each.model_copy(update={"source": named}) for each in (alone, pipeline))) is None
    sub = named.model_copy(update={"subfolder": "v2"})
    there, here = pipeline.model_copy(update={"source": named}), pipeline.model_copy(update={"source": sub})
    assert "the model in the root of a/b, and this one is the model in v2" in str(other_model(here, there))


def test_an_older_manifest_names_no_pipeline(pipeline: Manifest) -> None:
    assert pipeline.pipeline is not None
    older = pipeline.model_copy(update={"pipeline": None})
    wan = pipeline.model_copy(update={"pipeline": pipeline.pipeline.model_copy(update={"class_name": "WanPipeline"})})
    assert other_model(pipeline, older) is None and other_model(older, pipeline) is None
    assert other_model(pipeline, wan) == "a WanPipeline, and this is a CogVideoXPipeline"
    assert other_schemes(pipeline, older) is None


def test_configs_without_a_manifest() -> None:
    assert other_config({"architectures": ["A"]}, {"architectures": ["A"], "hidden_size": 1}) is None
    assert other_config({"_class_name": "A"}, {"_class_name": ["x", "A"]}) == "a ['x', 'A'], and this is an A"
    assert other_config({"architectures": ["A"]}, {"model_type": "a"}) == "an a, and this is an A"


@pytest.mark.parametrize(
    ("text", "found"),
    [("---\na: b\n---\n", False), ("---\na: b\n---", False), ("", False), ("---\na: b\n---\n\nx", True), ("# x", True)],
)
def test_text_of_a_card(text: str, found: bool, tmp_path: Path) -> None:
    for end in ("\n", "\r\n"):
        (tmp_path / "README.md").write_bytes(text.replace("\n", end).encode())
        assert cards.has_text(tmp_path) == found
    shutil.rmtree(tmp_path)
