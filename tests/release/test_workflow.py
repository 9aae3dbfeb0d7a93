"""The workflow in the README: its shape, and its shell steps on the loopback Hub."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_hub.fixtures import HubClient
from helpers.checkpoints import build_llama
from helpers.forking import Forker
from helpers.on_path import write_command

ROOT = Path(__file__).parents[2]
TOKEN = "hf_theTokenOfTheTests0123456789abcdefgh"
# steps that a shell here does not run, and why
NOT_RUN = {"Install": "aoconvert is installed, and a test needs no network"}
FILE = """
name = "Tiny | one"
source = "model"
repo = "{owner}/tiny-{variant}"
license = "mit"
defaults = { device = "cpu", min_quantized = 0 }
variants = [{ scheme = "int8wo" }, { scheme = "intx2wo" }]
gates = { min_sqnr_db = 20 }
"""


def workflow() -> dict[str, Any]:
    """The only workflow in the README."""
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```yaml\n")[1:]
    [found] = [loaded for block in blocks if "jobs" in (loaded := yaml.safe_load(block.partition("```")[0]))]
    return dict(found)


def test_its_shape() -> None:
    found = workflow()
    assert found[True] == {
        "workflow_dispatch": {"inputs": {"owner": {"description": "who publishes", "required": True}}}
    }
    [job] = found["jobs"].values()
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step), step
        assert "${{" not in step.get("run", ""), "what others can choose is no part of a shell's text"
    used = [step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step]
    assert used == [
        "actions/checkout",
        "actions/setup-python",
        "actions/cache/restore",
        "actions/cache/save",
        "actions/upload-artifact",
    ]
    assert set(NOT_RUN) <= {step.get("name") for step in job["steps"]}
    restored, saved = (step["with"] for step in job["steps"] if "cache/" in step.get("uses", ""))
    assert restored["key"] == saved["key"] and restored["path"] == saved["path"]


@pytest.mark.skipif(shutil.which("jq") is None, reason="a GitHub runner has jq, this machine does not")
def test_its_steps(hub_client: HubClient, tmp_path: Path, forker: Forker) -> None:
    hub_client.hub.state.add_user("me", TOKEN)
    [job] = workflow()["jobs"].values()
    values = {"${{ secrets.HF_TOKEN }}": TOKEN, "${{ inputs.owner }}": "me"}
    folder = tmp_path / "checkout"
    file = folder / job["env"]["FILE"]
    build_llama(file.parent / "model")
    file.write_text(FILE)
    summary = tmp_path / "summary.md"
    own = {name: values.get(value, value) for name, value in job["env"].items()}
    env = hub_client.environment(
        {**write_command(tmp_path / "bin", forker), **own, "GITHUB_STEP_SUMMARY": str(summary)}
    )
    said: dict[str, subprocess.CompletedProcess[str]] = {}
    for step in job["steps"]:
        failed = any(done.returncode for done in said.values())
        if "run" not in step or step["name"] in NOT_RUN or failed == (step.get("if") != "failure()"):
            continue
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        said[step["name"]] = subprocess.run(
            shell, cwd=folder, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
    codes = {name: done.returncode for name, done in said.items()}
    assert codes == {"Plan": 0, "Release": 4, "Say what went wrong": 0}, said
    assert '"min-sqnr-db"' in said["Say what went wrong"].stdout and "int8wo" not in said["Say what went wrong"].stdout
    lines = summary.read_text().splitlines()
    assert lines[0] == r"### Tiny \| one"
    assert lines[4].startswith("| `int8wo` | pushed |") and f"| {hub_client.hub.endpoint}/me/tiny-int8wo |" in lines[4]
    assert lines[5].startswith("| `intx2wo` | gate_failed |") and "min-sqnr-db" in lines[5]
    uploaded = job["steps"][-1]["with"]["path"].split()
    assert all(list(folder.glob(pattern)) for pattern in uploaded), uploaded
