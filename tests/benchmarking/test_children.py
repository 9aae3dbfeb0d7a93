"""What the fresh process does: what it counts, in which mode it runs, and what it times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from aoconvert.benchmarking.children import bench_child, workloads

REQUEST: dict[str, Any] = {"device": "cpu", "batch_size": 1, "tokens": 4, "steps": 1, "size": None, "frames": 9}


def llama() -> Any:
    config = tiny.transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    return tiny.transformers.LlamaForCausalLM(config).eval()


def test_bytes_of_inner_tensors_are_counted_and_tied_ones_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(32, 16, bias=False))
    assert bench_child.count_bytes(model) == 4 * (64 * 32 + 32 * 16)
    model.append(torch.nn.Linear(64, 32, bias=False))
    model[2].weight = model[0].weight
    assert bench_child.count_bytes(model) == 4 * (64 * 32 + 32 * 16)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "1")
    inner = [getattr(model[1].weight.data, name) for name in model[1].weight.__tensor_flatten__()[0]]
    assert bench_child.count_bytes(model) == 4 * 64 * 32 + sum(tensor.nbytes for tensor in inner)
    assert 32 * 16 + 4 * 16 <= sum(tensor.nbytes for tensor in inner) < 4 * 32 * 16  # codes, and a scale for each row


@pytest.mark.parametrize(("warm_ups", "compiled"), [(1, None), (2, pytest.approx(1.6))])
def test_warm_ups_are_not_timed_and_what_they_take_longer_is_compiling(
    warm_ups: int, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seconds that count are half of what a run takes altogether."""
    left = iter([1.0] * warm_ups + [0.3, 0.1, 0.2])

    def wall_time(run: Any) -> tuple[float, float]:
        altogether = run()
        return altogether / 2, altogether

    monkeypatch.setattr(bench_child, "wall_time", wall_time)
    workload = workloads.Workload(lambda: next(left), 4, "token", "")
    found = bench_child.measure(workload, "cpu", runs=3, warm_ups=warm_ups)
    assert next(left, None) is None
    assert (found["seconds"], found["seconds_min"], found["seconds_max"]) == (0.1, 0.05, 0.15)
    assert found["per_second"] == 40
    assert found["compile_seconds"] == compiled


def test_the_peak_is_that_of_the_timed_runs() -> None:
    """What the warm-up needed does not count."""
    before = bench_child.resident_peak()
    assert before is not None

    def run() -> float:
        torch.ones(1 << sizes.pop(0), dtype=torch.uint8)
        return 1.0

    sizes = [28, 10, 10]
    found = bench_child.measure(workloads.Workload(run, 1, "", ""), "cpu", runs=2, warm_ups=1)
    small = found["peak_bytes"]
    sizes = [10, 28, 10]
    assert bench_child.measure(workloads.Workload(run, 1, "", ""), "cpu", runs=2, warm_ups=1)["peak_bytes"] > small + (
        1 << 27
    )


def test_tokens_are_generated_and_counted_after_the_first() -> None:
    model = llama()
    given: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    decode = workloads.make_generation(model, {**REQUEST, "batch_size": 3}, decoding=True)
    assert decode.run() > 0
    assert given == [4, 1, 1, 1, 1]  # the prompt, and a token from each pass; four come after the first
    assert (decode.units, decode.unit) == (12, "generated token")
    given.clear()
    prefill = workloads.make_generation(model, REQUEST, decoding=False)
    assert prefill.run() > 0
    assert (given, prefill.units) == ([4], 4)


def test_tokens_that_mean_something_are_not_drawn() -> None:
    model = llama()
    model.config.eos_token_id, model.config.bos_token_id = 5, 7
    ids = workloads.draw_ids(model, 8, 64, "cpu")
    assert ids.shape == (8, 64)
    assert not {5, 7} & set(ids.flatten().tolist())
    assert torch.equal(ids, workloads.draw_ids(model, 8, 64, "cpu"))


def test_fused_projections_are_those_of_diffusers() -> None:
    model = tiny.flux_transformer()
    before = bench_child.count_bytes(model)
    bench_child.fuse(model)
    assert bench_child.count_bytes(model) > before
    quantized = tiny.flux_transformer()
    quantize_(quantized, Int8WeightOnlyConfig())
    with pytest.raises(RuntimeError, match="fuse_qkv_projections: NotImplementedError"):
        bench_child.fuse(quantized)


def test_a_model_that_takes_no_text_runs_on_inputs_that_are_found(tmp_path: Path) -> None:
    vae = tiny.image_vae().eval()
    request = {**REQUEST, "folder": str(tmp_path)}
    workload = workloads.make_forward(vae, request)
    assert workload.run() > 0
    assert workload.unit == "forward pass"
    with pytest.raises(RuntimeError, match="a batch of 1 only"):
        workloads.make_forward(vae, {**request, "batch_size": 2})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for a machine without a GPU")
def test_a_pipeline_on_a_cpu(pipeline: Path) -> None:
    """Its denoiser gets a batch's input from the pipeline, its call gives as many videos, and nothing is offloaded."""
    pipe = tiny.diffusers.DiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.bfloat16)
    step = workloads.make_step(pipe, pipe.transformer, {**REQUEST, "batch_size": 2})
    assert step.described.startswith("hidden_states [4, ")  # two texts, each with and without guidance
    assert step.run() > 0
    whole = workloads.make_call(pipe, {**REQUEST, "batch_size": 2, "steps": 2, "size": [64, 32]})
    assert (whole.unit, whole.units, whole.described) == ("video", 2, "2 steps, 64x32, 9 frames")
    for mode in ("model", "sequential"):
        with pytest.raises(RuntimeError, match="requires accelerator, but not found"):
            bench_child.offload(pipe, mode, "cpu")
    bench_child.offload(pipe, "vae-tiling", "cpu")
    assert pipe.vae.use_tiling
