"""What the repos of a release say of each other: the record, the card's table and picture, on the loopback Hub."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fake_hub.fixtures import HubClient
from fake_hub.server import Fault
from helpers.checkpoints import build_llama

TOKEN = "hf_theTokenOfTheTests0123456789abcdefgh"
FILE = """
name = "Tiny"
source = "model"
owner = "me"
repo = "{owner}/tiny-{variant}"
license = "mit"
collection = "Tiny, quantized"

[defaults]
device = "cpu"
min_quantized = 0

[[variants]]
scheme = "int8wo"

[[variants]]
scheme = "float8wo"

[[variants]]
scheme = "intx4wo"
"""
NAMES = ["int8wo", "float8wo", "intx4wo"]


class Runs:
    """Runs a release, and looks at the Hub."""

    def __init__(self, client: HubClient, folder: Path) -> None:
        self.client, self.folder = client, folder
        self.state = client.hub.state
        self.state.add_user("me", TOKEN)
        build_llama(folder / "model")
        (folder / "tiny.toml").write_text(FILE)

    def __call__(self, *words: str, code: int = 0) -> list[dict[str, Any]]:
        command = ["release", str(self.folder / "tiny.toml"), "--output-root", str(self.folder / "out"), "--json"]
        ran: subprocess.CompletedProcess[str] = self.client.command(*command, *words, token=TOKEN)
        assert ran.returncode == code, ran.stderr + ran.stdout
        return [json.loads(line) for line in ran.stdout.splitlines()]

    def told(self, lines: list[dict[str, Any]], *events: str) -> list[tuple[str, str]]:
        return [(line["event"], line["variant"]) for line in lines if line["event"] in events]

    def read(self, name: str, path: str) -> str:
        return self.state.read(f"me/tiny-{name}", path).decode()

    def table(self, name: str) -> list[str]:
        """First cells of the card's table of siblings."""
        card = self.read(name, "README.md")
        if "## Other versions of this model" not in card:
            return []
        section = card.partition("## Other versions of this model")[2].partition("\n## ")[0]
        return [line.split(" | ")[0].strip("| ") for line in section.splitlines() if line.startswith("|")][2:]

    def heads(self) -> list[str]:
        return [self.state.resolve(f"me/tiny-{name}", "main") for name in NAMES]


@pytest.fixture
def runs(hub_client: HubClient, tmp_path: Path) -> Runs:
    return Runs(hub_client, tmp_path)


def link(name: str) -> str:
    return f"[{name}](https://huggingface.co/me/tiny-{name})"


def test_every_repo_tells_of_the_others(runs: Runs) -> None:
    # the last commit of the second one fails: its weights are there, its card does not know the other one yet
    runs.client.hub.faults.append(Fault("me/tiny-float8wo/commit/", method="POST", status=403, skip=1, times=1))
    first = runs("--only", "int8wo", "--only", "float8wo", code=5)
    pushed = {line["variant"]: line["commit"] for line in first if line["event"] == "pushed"}
    assert runs.told(first, "card_updated", "failed") == [("card_updated", "int8wo"), ("failed", "float8wo")]
    assert runs.table("int8wo") == ["**int8wo** (this one)", link("float8wo")]
    failed = first[-1]["variants"][1]
    assert (failed["status"], failed["commit"]) == ("failed", runs.state.resolve("me/tiny-float8wo", "main"))

    # a later variant is in the tables of the earlier ones, whose weights stay where they are
    later = runs("--only", "intx4wo")
    updated = [("card_updated", name) for name in NAMES]
    assert runs.told(later, "pushed", "card_updated", "failed") == [("pushed", "intx4wo"), *updated]
    assert runs.table("int8wo") == ["**int8wo** (this one)", link("float8wo"), link("intx4wo")]
    assert runs.table("float8wo") == [link("int8wo"), "**float8wo** (this one)", link("intx4wo")]
    record = json.loads(runs.read("int8wo", "release.json"))
    assert {runs.read(name, "release.json") for name in NAMES} == {runs.read("int8wo", "release.json")}
    assert [each["name"] for each in record["variants"]] == NAMES
    assert {each["name"]: each["commit"] for each in record["variants"][:2]} == pushed
    local = json.loads((runs.folder / "out/tiny/release.json").read_text())
    for each, own in zip(record["variants"], local["variants"], strict=True):
        assert each["size_bytes"] > 0 and each["needs"]["loads_with"]["torchao"] and each["verified"]
        assert own["commit"] == each["commit"] and own["published"] == each
    assert str(runs.folder) not in runs.read("int8wo", "release.json") and "source" not in record["models"][0]
    assert "](release.svg)" in runs.read("int8wo", "README.md")
    assert "int8wo (this one)" in runs.read("int8wo", "release.svg")

    # nothing is sent again
    heads = runs.heads()
    again = runs()
    every = ("pushed", "unchanged", "card_updated", "failed", "card_not_updated")
    assert runs.told(again, *every) == [("unchanged", name) for name in NAMES]
    assert runs.heads() == heads and sum(line.get("bytes_sent", 0) for line in again) == 0
    [collection] = json.loads((runs.state.root / "collections.json").read_text()).values()
    assert collection["title"] == "Tiny, quantized"
    assert sorted(item["id"] for item in collection["items"]) == sorted(f"me/tiny-{name}" for name in NAMES)


@pytest.mark.exhaustive
def test_other_machines_and_other_people(runs: Runs) -> None:
    runs()
    commits = [each["commit"] for each in json.loads(runs.read("int8wo", "release.json"))["variants"]]

    # another machine knows what is published from the repos themselves
    lines = runs("--only", "intx4wo", "--output-root", str(runs.folder / "elsewhere"))
    [pushed] = [line for line in lines if line["event"] == "pushed"]
    assert runs.table("intx4wo") == [link("int8wo"), link("float8wo"), "**intx4wo** (this one)"]
    record = json.loads(runs.read("intx4wo", "release.json"))
    assert [each["commit"] for each in record["variants"]] == [*commits[:2], pushed["commit"]]
    reasons = {line["variant"]: line["reason"] for line in lines if line["event"] == "card_not_updated"}
    assert set(reasons) == {"int8wo", "float8wo"} and all("is not there" in reason for reason in reasons.values())

    # what somebody changed on the Hub is named, and the others go on
    runs.state.commit("me/tiny-float8wo", {"README.md": b"Mine.\n"})
    runs.client.run(f"from huggingface_hub import HfApi; HfApi(token={TOKEN!r}).delete_repo('me/tiny-int8wo')")
    by_hand = runs.state.resolve("me/tiny-float8wo", "main")
    lines = runs("--only", "intx4wo")
    reasons = {line["variant"]: line["reason"] for line in lines if line["event"] == "card_not_updated"}
    assert set(reasons) == {"int8wo", "float8wo"}
    assert "is not on the Hub" in reasons["int8wo"] and "README.md" in reasons["float8wo"]
    assert runs.state.resolve("me/tiny-float8wo", "main") == by_hand
    assert runs.table("intx4wo") == [link("float8wo"), "**intx4wo** (this one)"]
    assert lines[-1]["variants"][0].keys().isdisjoint({"published", "commit", "url"})
