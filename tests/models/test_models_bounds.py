"""A config that asks for far more than the weights files hold is refused before a library makes a model of it."""

import json
import resource
import shutil
import time

import pytest
from helpers.published import PUBLISHED

import aoconvert
from aoconvert.errors import SourceError
from aoconvert.models.bounds import Held, check_config, limit_model

HELD = Held.of([2] * 20)


def plan(source, **options):
    return aoconvert.plan(source, "int8wo", min_quantized=0.0, device="cpu", **options)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"num_hidden_layers": 100_000}, "num_hidden_layers = 1e+05"),
        ({"num_layers": 10**9}, "num_layers = 1e+09"),
        ({"num_layers": 1e9}, "num_layers = 1e+09"),
        ({"n_layer": 10**90}, "n_layer = 1e+90"),
        ({"text_config": {"num_hidden_layers": 10**6}}, "text_config.num_hidden_layers = 1e+06"),
        ({"layers_per_block": [2, 2, 10**7]}, "layers_per_block = 1e+07"),
        ({"vision": [{"depth": 5000}]}, "vision.depth = 5000"),
        ({"vocab_size": 10**12}, "vocab_size = 1e+12"),
        ({"num_local_experts": 10**12}, "num_local_experts = 1e+12"),
        ({"block_out_channels": [320, 10**11]}, "block_out_channels = 1e+11"),
    ],
)
def test_what_is_refused_by_its_key(config, what):
    with pytest.raises(SourceError) as caught:
        check_config("Model", config, HELD)
    assert caught.value.message == f"Model: its config asks for {what}, and its weights files hold 20 tensors"
    with pytest.raises(SourceError, match="no model has that many"):
        check_config("Model", config, None)


@pytest.mark.exhaustive
def test_what_models_have():
    """What lies in tests/fixtures/published and in the configs of the installed libraries' classes."""
    import transformers

    configs = [json.loads(path.read_text()) for path in PUBLISHED.rglob("config.json")]
    for name in dir(transformers):
        if name.endswith("Config") and issubclass(kind := getattr(transformers, name), transformers.PreTrainedConfig):
            try:
                configs.append(kind().to_dict())
            except Exception:  # one that needs arguments, or a package
                continue
    assert len(configs) > 300
    for config in configs:
        check_config("Model", config, None)
        check_config("Model", {"text_config": config}, HELD)


def test_what_registers_too_much_is_stopped():
    """However a class comes to it: more modules and parameters than the files' tensors account for."""
    from torch import nn

    before = resource.getrlimit(resource.RLIMIT_DATA)
    began = time.process_time()
    with (
        pytest.raises(SourceError, match="asks for more than 11,280 modules and parameters"),
        limit_model("Model", HELD),
    ):
        nn.ModuleList(nn.Identity() for _ in range(1_000_000))
    assert time.process_time() - began < 10
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    nn.ModuleList(nn.Identity() for _ in range(12_000))  # the hooks are gone


def test_memory_has_a_limit_too():
    """Buffers and tables that a class makes out of its config's numbers."""
    import numpy as np

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(MemoryError), limit_model("Model", HELD):
        np.ones(3 << 30)  # 24 GB
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**5},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**12},
        {"layer_types": ["full_attention"] * 300_000, "num_hidden_layers": 300_000},
    ],
)
@pytest.mark.parametrize("weights", [True, False])
def test_plan_refuses_at_once(checkpoints, tmp_path, changes, weights):
    shutil.copytree(checkpoints("llama-tied"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    if not weights:
        (tmp_path / "model" / "model.safetensors").unlink()
    plan(checkpoints("llama-tied"))  # what is imported once is imported
    began = time.process_time()
    with pytest.raises(SourceError, match="its config asks for"):
        plan(tmp_path / "model")
    assert time.process_time() - began < 2


def test_verify_refuses_before_it_opens_anything(checkpoints, tmp_path):
    """A folder without a manifest: its config is nobody's word."""
    aoconvert.quantize(checkpoints("llama-tied"), "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0.0)
    (tmp_path / "out" / "aoconvert.json").unlink()
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 10**9}))
    began = time.monotonic()
    report = aoconvert.verify(tmp_path / "out")
    assert time.monotonic() - began < 30
    assert [(check.name, check.status) for check in report.checks][-1] == ("pickle", "failed")
    assert "asks for num_hidden_layers = 1e+09" in report.checks[-1].detail
