"""Several models in several schemes, published, judged, stopped and continued: nothing is lost or done twice."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub.fixtures import HubClient
from helpers.checkpoints import build_llama, llama_tensors
from matrix import SCHEMES, Event, Matrix

Checkpoints = Callable[[str], Path]


@pytest.mark.parametrize(
    ("models", "schemes"),
    [
        (("llama", "t5"), ("int8wo", "intx4wo")),
        pytest.param(("llama", "t5", "cogvideox"), tuple(SCHEMES), marks=pytest.mark.exhaustive),
    ],
    ids=["small", "whole"],
)
def test_published_once(
    hub_client: HubClient, checkpoints: Checkpoints, tmp_path: Path, models: tuple[str, ...], schemes: tuple[str, ...]
) -> None:
    matrix = Matrix(hub_client, tmp_path / "work", models, schemes)
    matrix.build(checkpoints)
    hub = hub_client.hub.state

    # one scheme misses a gate: the others are published
    matrix.write(intx4wo="gates = { min_sqnr_db = 100 }")
    assert matrix.run() == 4
    missed = [name for name in matrix.variants if name.endswith("intx4wo")]
    others = [name for name in matrix.variants if name not in missed]
    assert matrix.told("gate_failed") == missed and matrix.told("pushed") == others
    assert sorted(matrix.commits()) == sorted(f"me/{name}" for name in others)
    statuses = {variant["name"]: variant["status"] for variant in matrix.events[-1]["variants"]}
    assert statuses == {**dict.fromkeys(missed, "gate_failed"), **dict.fromkeys(others, "pushed")}
    files = matrix.files()

    # a gate that it keeps: only these are sent, and nothing is made anew
    matrix.write(intx4wo="gates = { min_sqnr_db = 1 }")
    before = matrix.uploads()
    assert matrix.run() == 0
    assert matrix.told("quantized", again=False) == matrix.told("verified", again=False) == matrix.variants
    assert set(matrix.told("pushed")) >= set(missed) and matrix.told("gate_failed") == []
    assert matrix.files() == files
    assert set(matrix.uploads().values()) == {1} and matrix.uploads() > before

    # all of them are there, listed and verified; cards know the others
    assert sorted(matrix.commits()) == sorted(f"me/{name}" for name in matrix.variants)
    assert sorted(matrix.listed()) == sorted(f"me/{name}" for name in matrix.variants)
    for variant in matrix.events[-1]["variants"]:
        assert variant["verified"] and variant["status"] in ("pushed", "unchanged")
        assert (
            hub.read(variant["repo_id"], "aoconvert.json")
            == (matrix.root / variant["name"] / "aoconvert.json").read_bytes()
        )
        assert matrix.links(variant["name"]) == set(matrix.variants)

    # once more: nothing is sent
    commits, sent = matrix.commits(), matrix.sent()
    assert matrix.run() == 0
    assert matrix.told("unchanged") == matrix.variants
    assert (matrix.commits(), matrix.sent(), matrix.files()) == (commits, sent, files)


def quantizing(event: Event) -> bool:
    """The second variant is at work."""
    return event["event"] == "variant_started" and event["variant"].endswith("float8wo")


MOMENTS: dict[str, Callable[[Event], bool]] = {
    "quantizing": quantizing,
    "quantized": lambda event: event["event"] == "quantized" and event["variant"].endswith("float8wo"),
    "verified": lambda event: event["event"] == "verified" and event["variant"].endswith("float8wo"),
    "uploading": lambda event: event.get("stage") == "upload" and event["variant"].endswith("float8wo"),
    "pushed": lambda event: event["event"] == "pushed" and event["variant"].endswith("float8wo"),
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        pytest.param(*cell, marks=[] if cell == ("uploading", signal.SIGKILL) else pytest.mark.exhaustive)
        for cell in itertools.product(MOMENTS, (signal.SIGKILL, signal.SIGINT))
    ],
)
def test_stopped(
    hub_client: HubClient, checkpoints: Checkpoints, tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    matrix = Matrix(hub_client, tmp_path / "work", ("llama",), ("int8wo", "float8wo", "mixed"))
    matrix.build(checkpoints)
    matrix.stop(MOMENTS[moment], number)
    if number == signal.SIGINT:
        assert matrix.events[-1]["error"]["exit_code"] == 130, "it says so"
    made = set(matrix.told("quantized"))
    verified = set(matrix.told("verified"))
    pushed = set(matrix.told("pushed"))
    files, commits, uploads = matrix.files(), matrix.commits(), matrix.uploads()
    assert len(pushed) < 3, "it was killed in the middle"

    assert matrix.run() == 0
    assert set(matrix.told("quantized", again=False)) >= made
    assert set(matrix.told("verified", again=False)) >= verified
    assert files.items() <= matrix.files().items(), "what was whole is kept"
    assert {name: matrix.commits()[name] for name in commits if name.removeprefix("me/") in pushed}
    assert sorted(matrix.commits()) == [f"me/{name}" for name in sorted(matrix.variants)]
    # what had arrived is not sent again
    assert all(matrix.uploads()[content] == times for content, times in uploads.items())
    commits, sent = matrix.commits(), matrix.sent()
    assert matrix.run() == 0
    assert matrix.told("unchanged") == matrix.variants
    assert (matrix.commits(), matrix.sent()) == (commits, sent)


@pytest.mark.exhaustive
def test_a_new_commit_of_the_source(hub_client: HubClient, tmp_path: Path) -> None:
    state = hub_client.hub.state
    model = build_llama(tmp_path / "model")
    state.create_repo("org/llama")
    first = state.commit("org/llama", {path.name: path for path in model.iterdir()})
    matrix = Matrix(hub_client, tmp_path / "work", ("org/llama",), ("int8wo",))
    matrix.build(lambda name: tmp_path)
    assert (matrix.run(), matrix.told("pushed")) == (0, ["llama-int8wo"])
    assert matrix.events[-1]["variants"][0]["revision"] == first

    tensors = llama_tensors()
    tensors["model.norm.weight"] *= 2
    build_llama(model, tensors=tensors)
    second = state.commit("org/llama", {"model.safetensors": model / "model.safetensors"})
    assert matrix.run() == 0
    assert matrix.told("quantized", again=True) == matrix.told("pushed") == ["llama-int8wo"]
    assert matrix.events[-1]["variants"][0]["revision"] == second
    published = json.loads(state.read("me/llama-int8wo", "aoconvert.json"))
    assert published["source"]["revision"] == second
    commits, sent = matrix.commits(), matrix.sent()
    assert (matrix.run(), matrix.told("unchanged")) == (0, ["llama-int8wo"])
    assert (matrix.commits(), matrix.sent()) == (commits, sent)

    # what is pinned in the file stays
    text = (matrix.folder / "tiny.toml").read_text()
    (matrix.folder / "tiny.toml").write_text(text.replace('"org/llama"', f'"org/llama"\nrevision = "{first}"'))
    assert (matrix.run(), matrix.told("pushed")) == (0, ["llama-int8wo"])
    assert json.loads(state.read("me/llama-int8wo", "aoconvert.json"))["source"]["revision"] == first
