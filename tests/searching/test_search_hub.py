"""``auto`` of a Hub repo: it needs the weights, and nothing else of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub.fixtures import HubClient


@pytest.mark.exhaustive
def test_the_plan_fetches_the_weights_of_its_component(
    hub_client: HubClient, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoints("cogvideox")
    hub_client.hub.state.create_repo("user/model")
    hub_client.hub.state.commit(
        "user/model", {path.relative_to(source).as_posix(): path for path in source.rglob("*") if path.is_file()}
    )
    script = (
        "import aoconvert\n"
        "result = aoconvert.plan({source!r}, 'auto', device='cpu', target_bits=10.0, min_quantized=0.0).to_dict()"
    )
    made = hub_client.run(script.format(source="user/model"))
    local = hub_client.run(script.format(source=str(source)))
    assert made["components"] == local["components"]
    assert {tensor["scheme"] for tensor in made["components"][0]["tensors"]} == {"int8wo", None}
    fetched = [path for path in hub_client.home.rglob("*.safetensors") if path.is_symlink()]
    assert {path.parent.name for path in fetched} == {"transformer"}
