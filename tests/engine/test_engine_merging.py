"""Conversions of models whose tensors are made from others: the bytes, the memory and the disk they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.bits import assert_same
from helpers.converted import MODELS, build
from torchao.quantization import FqnToConfig, quantize_

import aoconvert
from aoconvert import schemes

REPO = Path(__file__).resolve().parents[2]

# A child's peak starts at the size of the process that starts it, and pytest is large by now: this one is small.
MEASURE = """
import json, os, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
json.dump([os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024], open(os.environ["MEASURED"], "w"))
"""


@pytest.mark.parametrize("scheme", ["int8wo", "float8wo"])
@pytest.mark.parametrize("name", ["nomic-bert", "olmo-hybrid", "qwen2-moe", "ernie-vl-moe"])
def test_as_quantize_after_from_pretrained(name: str, scheme: str, tmp_path: Path) -> None:
    """Also where the weight that is quantized is one part of a projection that the checkpoint holds fused."""
    source = tmp_path / "source"
    build(name, source)
    result = aoconvert.quantize(source, scheme, output=tmp_path / "out", device="cpu", min_quantized=0)
    [component] = result.manifest.components
    quantized = {tensor.name for tensor in component.tensors if tensor.action == "quantize"}
    assert any("experts" in at for at in quantized) == name.endswith("moe")
    model = getattr(tiny.transformers, MODELS[name][0]).from_pretrained(source, dtype=torch.bfloat16)
    config = schemes.get(scheme).config
    quantize_(model, FqnToConfig(OrderedDict.fromkeys(sorted(quantized), config)), filter_fn=None)
    expected = model.state_dict()
    written = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    tied = {tensor.name for tensor in component.tensors if tensor.action == "tied"}
    assert written.keys() | tied == expected.keys()
    for key, tensor in written.items():
        assert_same(tensor, expected[key], key)
    if name == "nomic-bert":
        assert any(at.endswith("q_proj.weight") for at in quantized)
    opened = getattr(tiny.transformers, MODELS[name][0]).from_pretrained(tmp_path / "out")
    assert {at for at, parameter in opened.named_parameters() if hasattr(parameter, "qdata")} == quantized


def sparse_mixtral(folder: Path, layers: int, shards: int) -> int:
    """A Mixtral of zeros that takes no disk: 201 MB of experts a layer, dealt to shards so that layers lie in two.

    Returns:
        Bytes of a layer's ``gate_up_proj``, its largest tensor.
    """
    hidden, inner, experts = 1024, 4096, 8
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 1024,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_local_experts": experts,
        "dtype": "bfloat16",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {
        "model.embed_tokens.weight": (1024, hidden),
        "lm_head.weight": (1024, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {
            **{f"{at}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"},
            **{f"{at}.self_attn.{name}_proj.weight": (hidden // 4, hidden) for name in "kv"},
            **{f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")},
            f"{at}.block_sparse_moe.gate.weight": (experts, hidden),
        }
        for expert in range(experts):
            for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                shapes[f"{at}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    weight_map = {}
    names = sorted(shapes)
    size = -(-len(names) // shards)
    for number in range(shards):
        part = names[number * size : (number + 1) * size]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        write_sparse(folder / file, {name: shapes[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return 2 * inner * hidden * experts * 2


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def watch(folder: Path, stop: threading.Event) -> Callable[[], int]:
    """Looks at the bytes in a folder until ``stop``; the most there were."""
    most = 0

    def look() -> None:
        nonlocal most
        while not stop.wait(0.02):
            total = 0
            for path in folder.rglob("*"):
                try:
                    total += path.stat().st_size if path.is_file() else 0
                except FileNotFoundError:
                    continue
            most = max(most, total)

    thread = threading.Thread(target=look)
    thread.start()

    def result() -> int:
        stop.set()
        thread.join()
        return most

    return result


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="the limit was measured on Linux")
def test_experts_take_the_disk_of_the_output_and_the_memory_of_a_few_tensors(tmp_path: Path) -> None:
    source, place = tmp_path / "source", tmp_path / "place"
    place.mkdir()
    largest = sparse_mixtral(source, layers=4, shards=3)
    measured = tmp_path / "measured.json"
    words = ["-m", "aoconvert", "quantize", str(source), "--scheme", "int8wo", "--output", str(place / "out")]
    words += ["--device", "cpu", "--min-quantized", "0", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "MEASURED": str(measured)}
    stop = threading.Event()
    most = watch(place, stop)
    try:
        done = subprocess.run(
            [sys.executable, "-S", "-c", MEASURE, sys.executable, *words],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        on_disk = most()
    code, peak = json.loads(measured.read_text())
    assert code == 0, done.stderr
    final = sum(path.stat().st_size for path in (place / "out").iterdir())
    assert on_disk < 1.01 * final
    imports = 480 * 10**6 if torch.version.cuda is None else 800 * 10**6
    assert peak < imports + 3 * largest
    written = torch.load(place / "out" / "pytorch_model.bin", weights_only=True, mmap=True)
    experts = written["model.layers.3.mlp.experts.gate_up_proj"]
    assert experts.shape == (8, 8192, 1024)
    assert not experts.qdata[::3, ::1000].any()
