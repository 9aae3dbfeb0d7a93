"""What ``migrate`` wrote is verified and published like any other result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_hub.fixtures import HubClient
from pushing import Pusher, entries

import aoconvert
from aoconvert.checkpoint import manifest as manifests

LEGACY = Path(__file__).parents[1] / "fixtures" / "legacy" / "diffusers-0.33.1-torchao-0.10.0"


def test_a_migrated_checkpoint_is_published(me: Pusher, tmp_path: Path) -> None:
    done = aoconvert.migrate(LEGACY / "int8wo", output=tmp_path / "out")
    assert aoconvert.verify(done.output, reload=False).ok
    outcome = me.push(done.output, "me/migrated")
    assert "value" in outcome, outcome
    found = entries(me.hub, "me/migrated")
    assert set(found) >= {
        *("config.json", "diffusion_pytorch_model.bin", "aoconvert.json", "aoconvert.verify.json", "README.md"),
        ".gitattributes",
    }
    card = me.hub.state.read("me/migrated", "README.md").decode()
    assert "Migrated from an old torchao checkpoint (`int8wo`, torchao 0.7 to 0.17): 16 tensors with the same" in card


@pytest.mark.exhaustive
def test_an_old_repo_of_the_hub(hub_client: HubClient, tmp_path: Path) -> None:
    """Only what is needed is fetched, and the result names the commit."""
    state = hub_client.hub.state
    state.create_repo("user/old")
    files = {path.name: path for path in (LEGACY / "int8wo").iterdir()}
    sha = state.commit("user/old", {**files, "other.safetensors": files["dequant.safetensors"]})
    done = hub_client.command("migrate", "user/old", "-o", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tensors"]["carried"] == 16
    manifest = manifests.load(tmp_path / "out")
    assert (manifest.source.kind, manifest.source.repo_id, manifest.source.revision) == ("hub", "user/old", sha)
    assert manifest.run.command == f"aoconvert migrate user/old --revision {sha}"
    assert not [request for request in hub_client.hub.requests("") if "other.safetensors" in str(request)]
    again = aoconvert.migrate(LEGACY / "int8wo", output=tmp_path / "again")
    weights = "diffusion_pytorch_model.bin"
    assert (again.output / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()
