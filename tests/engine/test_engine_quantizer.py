"""The way over a GPU's lanes: without one its code runs on the CPU; on a GPU it is compared with the CPU."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.bits import same
from helpers.one_tensor import begin, quantize_tensor
from torchao.quantization import quantize_

import aoconvert
from aoconvert import accelerators, schemes
from aoconvert.engine.acceleration import NoKernels
from aoconvert.engine.assembly import Assembly
from aoconvert.engine.block_quantizer import BlockQuantizer, WeightSlice
from aoconvert.engine.quantizer import Quantizer
from aoconvert.errors import QuantizeError, UsageError
from aoconvert.planning.slices import SLICE_BYTES

gpu = pytest.mark.gpu
GPUS = torch.cuda.device_count()


def compare(device: str, name: str, rows: int, step: int) -> None:
    scheme = schemes.get(name)
    torch.manual_seed(rows)
    weight = torch.randn(rows, 256, dtype=torch.float32)
    lane = BlockQuantizer(device)
    pending = [begin(lane, "w", weight, torch.bfloat16, scheme, 256 * step) for _ in range(3)]
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


@gpu
@pytest.mark.skipif(not GPUS, reason="no CUDA device here")
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["int8wo", "float8wo", "int4dq", "intx4wo", "nvfp4wo", "mxfp8"])
def test_a_gpu_gives_what_quantize_gives_on_it(name: str, base: torch.dtype) -> None:
    """Also where the CPU gives other bytes: float32, and NVFP4's scale of a whole weight."""
    scheme = schemes.get(name)
    if schemes.blocker((256, 512), base, scheme) is not None:
        pytest.skip(f"{name} takes no {base}")
    weight = torch.randn(256, 512, dtype=torch.float32)
    tensor, _ = begin(BlockQuantizer("cuda:0"), "w", weight.pin_memory(), base, scheme, 100 * 512)()
    linear = torch.nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.to(base).cuda(), requires_grad=False)
    quantize_(linear, scheme.config)
    assert same(tensor, linear.weight.detach().cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divisor", [127.5, 7.5, 15.0, 255.0, 6.0, 2688.0, 448.0, 57344.0])
def test_how_a_gpu_divides_by_a_number(divisor: float, dtype: torch.dtype) -> None:
    """CUDA multiplies by the reciprocal (PyTorch's BinaryDivTrueKernel.cu). torchao divides by these numbers: no
    quotient of bfloat16 values depends on it, some of float16 do. README says what follows."""
    values = torch.arange(0x8000, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    reciprocal = float(torch.tensor(1.0) / torch.tensor(divisor))
    different = int((values / divisor != (values.float() * reciprocal).to(dtype)).sum())
    assert different == 0 if dtype == torch.bfloat16 else different < 100


def test_nan_is_named_when_the_result_is_asked_for() -> None:
    weight = torch.zeros(4, 256)
    weight[2, 2] = torch.nan
    wait = begin(BlockQuantizer("cpu"), "blocks.0.weight", weight, torch.bfloat16, schemes.get("int8wo"), 2 * 256)
    with pytest.raises(QuantizeError, match=r"blocks\.0\.weight holds NaN or infinity"):
        wait()


def test_pieces_are_dealt_by_bytes() -> None:
    scheme = schemes.get("int8wo")
    lanes = [BlockQuantizer("cpu"), BlockQuantizer("cpu")]
    quantizer = Quantizer(("cpu",), NoKernels())
    assert not quantizer.takes_page_locked(scheme)
    quantizer._gpus = lanes
    for rows in (100, 10, 10, 10):
        into = Assembly.of((rows, 64), torch.bfloat16, scheme).rows(0, rows)
        quantizer.start(WeightSlice("w", torch.randn(rows, 64), torch.bfloat16, scheme), into)()
    assert [lane.bytes for lane in lanes] == [100 * 64 * 4, 30 * 64 * 4]


def test_pieces_wait_for_lanes_and_buffers() -> None:
    """A small tensor that is only copied takes no lane; giants do not pile up."""
    lanes = Quantizer(("cpu",), NoKernels())
    assert lanes.crowded([None])
    lanes._gpus = [BlockQuantizer("cpu"), BlockQuantizer("cpu")]
    assert not lanes.crowded([1, None, 1, None])
    assert lanes.crowded([1, None, 1, None, 1])
    assert lanes.crowded([None] * 5)  # of as many buffers, and the reader wants one
    assert not lanes.crowded([SLICE_BYTES, SLICE_BYTES])
    assert lanes.crowded([2 * SLICE_BYTES + 1])


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("XPU out of memory. Tried to allocate 2.00 MiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"), True),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_a_device_is_full(error: Exception, full: bool) -> None:
    assert accelerators.is_full(error) is full


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu() -> None:
    """What torch itself says of a device that is not here, and of page-locked memory that nobody gives."""
    assert accelerators.failure("cpu") is None
    assert accelerators.failure("cuda")
    memory = accelerators.page_locked((2, 3), (1, 2), torch.float32)
    assert (memory.shape, memory.stride(), memory.dtype) == ((2, 3), (1, 2), torch.float32)
    assert [accelerators.count(kind) for kind in accelerators.KINDS] == [0, 0]


def test_a_default_device_of_the_caller(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """As in a notebook: ``torch.set_default_device`` is about the caller's tensors."""
    source, digests = checkpoints("opt"), []
    for name in (None, "meta"):
        torch.set_default_device(name)
        try:
            out = tmp_path / str(name)
            aoconvert.quantize(source, "float8wo", output=out, device="cpu", min_quantized=0)
            assert torch.get_default_device().type == name or name is None
        finally:
            torch.set_default_device(None)
        digests.append(hashlib.sha256((out / "pytorch_model.bin").read_bytes()).hexdigest())
    assert digests[0] == digests[1]


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
        with pytest.raises(QuantizeError, match=r"no memory left|cannot be used"):
            aoconvert.quantize(checkpoints("sd3"), "int8wo", output=tmp_path / "a", device="cuda", min_quantized=0)
        aoconvert.quantize(checkpoints("sd3"), "int8wo", output=tmp_path / "b", device="auto", min_quantized=0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
