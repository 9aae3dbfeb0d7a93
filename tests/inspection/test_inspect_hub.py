"""A Hub repo is inspected from ranged requests: real HTTP on loopback, the unmodified Hub client."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub.fixtures import HubClient
from fake_hub.server import Fault, total_bytes
from fake_hub.state import Entry
from safetensors.torch import save_file

import aoconvert
from aoconvert.environment import import_torchao

SCRIPT = """
from aoconvert.inspection.inspect import inspect
from aoconvert.options import HubOptions
result = attempt(lambda: inspect('user/model').to_dict())
result['torch'] = 'torch' in sys.modules
"""
CONFIG = b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'


class Sparse:
    """A file to write to that seeks over zeros: a gigabyte of them takes no disk."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def write(self, data: bytes) -> int:
        if len(data) > 1 << 20 and not torch.frombuffer(data, dtype=torch.uint8).any():
            self._file.seek(len(data), 1)
        else:
            self._file.write(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.truncate()
        self._file.close()


def add_large(client: HubClient, path: str, file: Path) -> None:
    """Commit a file without reading it: its name in the store need not be its hash for what is asked here."""
    state = client.hub.state
    oid = "ab" * 32
    shutil.move(file, state.blob(oid))
    store = state._store
    size = state.blob(oid).stat().st_size
    state._store = lambda name, content: Entry(oid, size, True) if name == path else store(name, content)  # type: ignore[method-assign]
    state.commit("user/model", {path: b""})


def bodies(client: HubClient) -> int:
    return total_bytes(client.hub.log)


def test_a_gigabyte_bin_costs_less_than_a_megabyte(hub_client: HubClient, tmp_path: Path) -> None:
    import_torchao()
    from torchao.quantization import Int8Tensor

    side, layers = 1 << 12, 64  # many storages: a look at each would cost a request each
    zeros = torch.zeros(side, side, dtype=torch.int8)
    scale, zero_point = torch.ones(side, 1).bfloat16(), torch.zeros(side, 1, dtype=torch.int8)
    weights = {
        f"layers.{number}.weight": Int8Tensor(
            zeros.clone(), scale, [1, side], torch.bfloat16, zero_point=zero_point.clone()
        )
        for number in range(layers)
    }
    big = tmp_path / "big.bin"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the buffer may not be written to
        file = Sparse(big)
        torch.save(weights, file)  # type: ignore[arg-type]
        file.close()
    assert big.stat().st_size > 1 << 30
    assert len(torch.load(big, weights_only=True, mmap=True)) == layers
    hub_client.hub.state.create_repo("user/model")
    hub_client.hub.state.commit("user/model", {"config.json": CONFIG, "tokenizer.json": b" " * 3_000_000})
    add_large(hub_client, "pytorch_model.bin", big)
    result = hub_client.run(SCRIPT, fresh=True)
    found = result["value"]
    assert (found["kind"], found["scheme"], found["loads_here"]) == ("torchao", "int8wo", True)
    assert found["quantized_parameters"] == layers * side * side
    assert found["files"][0]["size"] > 1 << 30
    # everything on the wire, the Hub's own answers included
    assert bodies(hub_client) < 1_000_000
    assert 0 < found["bytes_fetched"] <= bodies(hub_client)
    asked = hub_client.hub.requests("/lfs/", method="GET", server="store")
    assert 0 < len(asked) < 10
    assert all(request.range for request in asked)
    assert not hub_client.hub.requests("tokenizer.json")
    assert not list(hub_client.home.glob("**/pytorch_model.bin"))
    assert result["torch"] is False


def test_the_same_is_said_of_a_repo_and_a_folder(
    hub_client: HubClient, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    aoconvert.quantize(checkpoints("cogvideox"), "int8wo", output=output, device="cpu")
    here = json.loads(json.dumps(aoconvert.inspect(output).to_dict()))
    state = hub_client.hub.state
    state.create_repo("user/model")
    names = [path for path in output.rglob("*") if path.is_file()]
    commit = state.commit("user/model", {path.relative_to(output).as_posix(): path for path in names})
    found = hub_client.run(SCRIPT)["value"]
    assert (found["revision"], found["path"]) == (commit, "user/model")
    for key in set(here) - {"path", "revision", "bytes_fetched", "next"}:
        assert found[key] == here[key], key
    assert (found["next"], here["next"]) == ("aoconvert verify user/model", f"aoconvert verify {output}")
    assert found["written_by"]["how"] == "aoconvert.json"


def test_safetensors_header_only(hub_client: HubClient, tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2048, 1024)}, tmp_path / "model.safetensors")
    state = hub_client.hub.state
    state.create_repo("user/model")
    state.commit("user/model", {"config.json": CONFIG, "model.safetensors": tmp_path / "model.safetensors"})
    found = hub_client.run(SCRIPT)["value"]
    assert (found["kind"], found["parameters"]) == ("plain", 2048 * 1024)
    assert found["bytes_fetched"] < 100_000


def small_repo(client: HubClient, tmp_path: Path, **settings: Any) -> None:
    torch.save({"a.weight": torch.zeros(512, 512)}, tmp_path / "pytorch_model.bin")
    client.hub.state.create_repo("user/model", **settings)
    client.hub.state.commit("user/model", {"config.json": CONFIG, "pytorch_model.bin": tmp_path / "pytorch_model.bin"})


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (Fault("/lfs/", status=200, body=b"x" * 100_000), "does not support requests for part of a file"),
        (Fault("/lfs/", cut_after=1000), "the connection to .* broke"),
        (Fault("/lfs/", reset=True), "the connection to .* broke"),
        (Fault("/lfs/", status=206, body=b"short"), "5 bytes arrived instead of"),
        (Fault("/lfs/", status=206, body=b"x" * 3_000_000), "bytes arrived instead of"),
        (Fault("pytorch_model.bin", status=503), r"the Hub failed \(503\)"),
        (Fault("pytorch_model.bin", status=403), r"may not read this \(403\)"),
    ],
)
def test_faults_become_one_line(fault: Fault, what: str, hub_client: HubClient, tmp_path: Path) -> None:
    small_repo(hub_client, tmp_path)
    hub_client.hub.faults.append(fault)
    result = hub_client.run(SCRIPT)
    assert result["error"] == "HubError"
    assert re.search(what, result["message"])
    assert "\n" not in result["message"]
    assert result["hint"]
    # an answer that is too long is not read to its end
    sizes = re.findall(r"([\d,]+) bytes arrived", result["message"])
    assert all(int(size.replace(",", "")) < 1_000_000 for size in sizes)


def test_private_repo(hub_client: HubClient, tmp_path: Path) -> None:
    hub_client.hub.state.add_user("me", "hf_secret_token")
    small_repo(hub_client, tmp_path, private=True, readers=["me"])
    assert hub_client.run(SCRIPT)["error"] == "HubError"
    script = SCRIPT.replace("'user/model'", "'user/model', HubOptions(token=sys.stdin.read())")
    result = hub_client.run(script, stdin="hf_secret_token")
    assert result["value"]["parameters"] == 512 * 512
    # the token stays with the Hub: the store is another origin
    assert all(request.token is None for request in hub_client.hub.requests("/lfs/", server="store"))


def test_offline_says_what_is_missing(hub_client: HubClient, tmp_path: Path) -> None:
    small_repo(hub_client, tmp_path)
    online = hub_client.run(SCRIPT)["value"]
    result = hub_client.run(SCRIPT, env={"HF_HUB_OFFLINE": "1"})
    assert result["error"] == "HubError"
    assert "pytorch_model.bin is not in the cache" in result["message"]
    hub_client.run("source = resolve('user/model')\nsource.fetch(['pytorch_model.bin'])")
    again = hub_client.run(SCRIPT, env={"HF_HUB_OFFLINE": "1"})["value"]
    assert (again["parameters"], again["bytes_fetched"]) == (online["parameters"], 0)


def test_unknown_repo(hub_client: HubClient) -> None:
    result = hub_client.run(SCRIPT)
    assert (result["error"], result["exit_code"]) == ("HubError", 5)
