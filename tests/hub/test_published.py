"""What was published opens from the Hub: by the code on its card, as it is printed, and with an empty cache."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub.fixtures import HubClient
from fake_hub.server import Fault, LoopbackHub
from helpers import tiny
from helpers.forking import Forker
from markdown_it import MarkdownIt
from pushing import TOKEN, WITH_TOKEN, XET, Pusher
from table.families import FAMILIES, TRANSFORMERS, Checkpoints

import aoconvert

Fresh = Callable[..., Path]

# After the code on the card: every weight has data, and the quantized ones are torchao's.
LOOK = """
whole = globals().get("pipe", globals().get("model"))
models = [m for m in getattr(whole, "components", {"": whole}).values() if isinstance(m, torch.nn.Module)]
state = {name: value for m in models for name, value in m.state_dict().items()}
assert models and not any(value.is_meta for value in state.values())
print("quantized:", sum(type(value).__module__.startswith("torchao") for value in state.values()))
"""


@pytest.fixture(params=["lfs"])
def way(request: pytest.FixtureRequest, tmp_path: Path, forker: Forker) -> Iterator[tuple[HubClient, dict[str, str]]]:
    (tmp_path / "hub").mkdir()
    with LoopbackHub(tmp_path / "hub", xet=request.param == "xet") as hub:
        hub.state.add_user("me", TOKEN)
        yield HubClient(hub, tmp_path / "hf_home", forker), XET if request.param == "xet" else WITH_TOKEN


def card_code(client: HubClient, repo: str, revision: str = "main") -> list[str]:
    """The Python blocks of the card on the Hub."""
    text = client.hub.state.read(repo, "README.md", revision).decode().partition("\n---\n")[2]
    return [token.content for token in MarkdownIt().parse(text) if token.type == "fence" and token.info == "python"]


def run_alone(client: HubClient, code: str, home: Path, env: dict[str, str]) -> str:
    """A program in a process that knows nothing of aoconvert, with a cache that is not there yet."""
    assert not home.exists()
    environment = client.environment({**env, "HF_HOME": str(home)})
    environment.pop("PYTHONPATH")
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], env=environment, capture_output=True, text=True, timeout=600, check=False,
        cwd=client.hub.state.root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Failed to load" not in done.stdout
    return done.stdout


def test_the_demo_opens_by_the_code_on_its_card(
    way: tuple[HubClient, dict[str, str]], fresh: Fresh, tmp_path: Path
) -> None:
    client, env = way
    done = client.command("push", "me/demo", str(fresh("pipeline")), "--json", env=env)
    assert done.returncode == 0, done.stderr
    load, usage = card_code(client, "me/demo")
    assert "DiffusionPipeline.from_pretrained('me/demo', torch_dtype=torch.bfloat16)" in load
    few = usage.replace("pipe(prompt", "pipe(prompt, num_inference_steps=1, num_frames=9, height=64, width=64")
    out = run_alone(client, load + LOOK + few.replace('"video.mp4"', f'"{tmp_path}/v.mp4"'), tmp_path / "empty", {})
    assert "quantized: 37" in out
    assert (tmp_path / "v.mp4").stat().st_size > 0
    fetched = {entry.path.rpartition("/")[2] for entry in client.hub.requests("/resolve/", method="HEAD")}
    assert "diffusion_pytorch_model.bin" in fetched and "pytorch_model.bin" in fetched


@pytest.mark.exhaustive
def test_the_example_runs_where_the_card_claims_that_it_ran(
    way: tuple[HubClient, dict[str, str]], fresh: Fresh
) -> None:
    client, env = way
    for claimed in (False, True):
        folder = fresh("pipeline")
        report = aoconvert.verify(folder, example=claimed)
        assert report.example == claimed, report.to_dict()
        done = client.command("push", f"me/demo-{claimed}", str(folder), "--verify-hub", "--json", env=env)
        assert done.returncode == 0, done.stderr
        ran = [one["what"] for one in json.loads(done.stdout)["verification"]["ran"]]
        assert ran == ["load", "forward", *(["example"] if claimed else [])]


@pytest.mark.exhaustive
def test_a_push_that_does_not_open_says_so(me: Pusher, fresh: Fresh) -> None:
    """The commit is there; whoever fetches it cannot have its weights."""
    me.hub.faults.append(Fault(r"/resolve/.*\.bin", status=403))
    done = me.push(fresh(), "me/shut", verify_hub=True)["value"]
    report = done["verification"]
    assert not report["ok"]
    assert report["published"] == {"repo_id": "me/shut", "revision": "main", "commit": done["commit"]}
    [failed] = [check for check in report["checks"] if check["status"] == "failed"]
    assert failed["name"] == "reload" and "with an empty cache" in failed["detail"]
    said = " ".join(done["warnings"])
    short = done["commit"][:12]
    assert f"commit {short} is on the Hub, but does not pass the verification from there: reload: " in said
    assert f"aoconvert verify me/shut --revision {done['commit']}" in said
    assert f"{me.hub.endpoint}/me/shut/commits/main" in said


# --- every family, by each way and by each kind of load code

# by default the demo runs above, and a transformers model in test_verify_hub
ROWS = [
    pytest.param(*row, marks=pytest.mark.exhaustive, id="-".join(row))
    for row in itertools.product(FAMILIES, ["lfs", "xet"], ["from-pretrained", "assign"])
]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize(("family", "way", "strategy"), ROWS, indirect=["way"])
def test_every_family(
    family: str, way: tuple[HubClient, dict[str, str]], strategy: Any, table: Checkpoints, tmp_path: Path
) -> None:
    client, env = way
    out = tmp_path / "out"
    aoconvert.quantize(table.source(family, False), "int8wo", output=out, device="cpu", min_quantized=0)
    # the card shows the way that was proven, else the usual one
    assert aoconvert.verify(out, strategy=strategy, reload=strategy == "assign", forward=False).ok
    opens = ["--verify-hub", "--private"] if env is XET else []
    pushed = client.command("push", "me/x", str(out), *opens, "--json", env=env, timeout=600)
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    done = json.loads(pushed.stdout)
    assert not opens or done["verification"]["strategy"] == strategy
    empty = {**env, "HF_HOME": str(tmp_path / "home")}
    found = client.command("verify", "me/x", "--example", "--json", env=empty, timeout=600)
    report = json.loads(found.stdout)
    assert found.returncode == 0, report
    assert (report["strategy"], report["published"]["commit"]) == (strategy, done["commit"])
    assert "different code" not in found.stdout
    ran = {item["what"] for item in report["ran"]}
    assert {"load", "forward"} <= ran
    assert ("example" in ran) == (family not in TRANSFORMERS)  # which have no tokenizer here
    load = card_code(client, "me/x")[0]
    assert ("snapshot_download" in load) == (strategy == "assign")
    kind = tiny.FAMILIES[family]
    step = f"import sys; sys.path.insert(0, {str(Path(tiny.__file__).parents[1])!r})\nfrom helpers import tiny\n"
    step += f"assert tiny.{kind.step.__name__}(whole).isfinite().all()"
    text = run_alone(client, load + LOOK + step, tmp_path / "alone", env)
    assert int(text.split("quantized:")[1].split()[0]) > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("shards", [None, "200KB"], ids=["one file", "shards"])
def test_a_denoiser_alone(
    shards: str | None, way: tuple[HubClient, dict[str, str]], table: Checkpoints, tmp_path: Path
) -> None:
    """A diffusers model that is no pipeline: its own class opens it, told to look for .bin where it is in shards."""
    client, env = way
    options: dict[str, Any] = {"component_only": True, **({"max_shard_size": shards} if shards else {})}
    aoconvert.quantize(table.source("pixart", False), "int8wo", output=tmp_path / "out", device="cpu", **options)
    assert aoconvert.verify(tmp_path / "out", reload=False).ok
    pushed = client.command("push", "me/x", str(tmp_path / "out"), "--verify-hub", "--json", env=env, timeout=600)
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    report = json.loads(pushed.stdout)["verification"]
    assert {item["what"] for item in report["ran"]} == {"load", "forward"}
    [load] = card_code(client, "me/x")
    assert "PixArtTransformer2DModel.from_pretrained('me/x', torch_dtype=torch.bfloat16" in load
    assert "quantized: " in run_alone(client, load + LOOK, tmp_path / "alone", env)


@pytest.mark.exhaustive
def test_original_files_open_by_the_code_on_their_card(
    way: tuple[HubClient, dict[str, str]], table: Checkpoints, tmp_path: Path
) -> None:
    """Two kinds of weights files: diffusers alone would fetch one of them."""
    client, env = way
    source = table.source("cogvideox", False)
    aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu", keep_original_files=True)
    assert aoconvert.verify(tmp_path / "out").ok
    pushed = client.command("push", "me/x", str(tmp_path / "out"), "--verify-hub", "--json", env=env, timeout=600)
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    [load, _] = card_code(client, "me/x")
    assert "folder = snapshot_download('me/x')" in load
    assert "quantized: " in run_alone(client, load + LOOK, tmp_path / "alone", env)
    plain = "import torch\nfrom diffusers import DiffusionPipeline\nDiffusionPipeline.from_pretrained('me/x')"
    with pytest.raises(AssertionError, match="no file named"):
        run_alone(client, plain, tmp_path / "plain", env)
