"""The way over a GPU's lanes: without one its code runs on the CPU; on a GPU it is compared with the CPU."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import aoconvert
from aoconvert import schemes
from aoconvert.engine.blocks import Blocks, cut
from aoconvert.engine.kernels import Kernels
from aoconvert.engine.lanes import Lane, Lanes
from aoconvert.engine.quantize import quantize_tensor
from aoconvert.errors import QuantizeError, UsageError
from aoconvert.schemes.apply import flatten

gpu = pytest.mark.gpu
GPUS = torch.cuda.device_count()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return type(one) is type(other) and all(
        torch.equal(getattr(one, name).view(torch.uint8), getattr(other, name).view(torch.uint8))
        for name in flatten(one)[0]
    )


def compare(device: str, name: str, rows: int, step: int) -> None:
    scheme = schemes.get(name)
    torch.manual_seed(rows)
    weight = torch.randn(rows, 256, dtype=torch.float32)
    lane = Lane(device)
    pending = [lane.start("w", weight, torch.bfloat16, scheme, cut(weight, scheme, 256 * step)) for _ in range(3)]
    expected = quantize_tensor("w", weight, torch.bfloat16, scheme, "cpu")
    for wait in pending:
        tensor, error = wait()
        assert same(tensor, expected.tensor)
        assert (error.sqnr_db, error.largest) == (expected.sqnr_db, expected.max_abs_error)


@pytest.mark.parametrize("name", ["int8wo", "float8wo", "int4dq"])
@pytest.mark.parametrize(("rows", "step"), [(1, 1), (7, 2), (64, 64), (65, 16)])
def test_a_lane_gives_what_the_usual_way_gives(name: str, rows: int, step: int) -> None:
    compare("cpu", name, rows, step)


@gpu
@pytest.mark.skipif(not GPUS, reason="no CUDA device here")
@pytest.mark.parametrize("name", ["int8wo", "float8wo", "int4dq"])
def test_a_gpu_gives_the_bits_of_the_cpu(name: str) -> None:
    compare("cuda:0", name, 1000, 128)


def test_nan_is_named_when_the_result_is_asked_for() -> None:
    weight = torch.zeros(4, 256)
    weight[2, 2] = torch.nan
    wait = Lane("cpu").start("blocks.0.weight", weight, torch.bfloat16, schemes.get("int8wo"), Blocks(2))
    with pytest.raises(QuantizeError, match=r"blocks\.0\.weight holds NaN or infinity"):
        wait()


def test_pieces_are_dealt_by_bytes() -> None:
    scheme = schemes.get("int8wo")
    lanes = Lanes(("cpu",), Kernels("cpu", {}))
    assert lanes.depth == 0
    lanes._lanes = [Lane("cpu"), Lane("cpu")]
    for rows in (100, 10, 10, 10):
        lanes.start("w", torch.randn(rows, 64), torch.bfloat16, scheme)()
    assert [lane.bytes for lane in lanes._lanes] == [100 * 64 * 4, 30 * 64 * 4]


def test_device_lists() -> None:
    from aoconvert.environment import choose_devices

    assert choose_devices("cpu") == ("cpu",)
    for wrong in ("cpu,cpu:0", "cpu,cuda:0", "gpu", "cuda:x"):
        with pytest.raises((UsageError, aoconvert.PlanError)):
            choose_devices(wrong)


@gpu
@pytest.mark.skipif(not GPUS, reason="no CUDA device here")
@pytest.mark.parametrize("device", ["cuda", pytest.param("cuda:all", id="all")])
@pytest.mark.parametrize("scheme", ["int8wo", "float8wo", "int8dq"])
def test_files_are_the_cpus(device: str, scheme: str, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    digests = []
    for name in ("cpu", device):
        out = tmp_path / name.replace(":", "-")
        aoconvert.quantize(checkpoints("cogvideox"), scheme, output=out, device=name, min_quantized=0)
        digests.append(hashlib.sha256((out / "transformer/diffusion_pytorch_model.bin").read_bytes()).hexdigest())
    assert digests[0] == digests[1]


@gpu
@pytest.mark.skipif(not GPUS, reason="no CUDA device here")
def test_a_full_gpu(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """A process that may use next to nothing of the GPU: an error by name, or with ``auto`` the CPU."""
    torch.cuda.set_per_process_memory_fraction(1e-6, 0)
    try:
        with pytest.raises(QuantizeError, match="no memory left"):
            aoconvert.quantize(checkpoints("sd3"), "int8wo", output=tmp_path / "a", device="cuda", min_quantized=0)
        aoconvert.quantize(checkpoints("sd3"), "int8wo", output=tmp_path / "b", device="auto", min_quantized=0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
