"""The way over GPUs, on a pretended one: the CPU's bytes, whatever is late, full, taken or broken."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bits import same
from helpers.one_tensor import begin, quantize_tensor
from helpers.pretended_gpu import Mistake, OnDevice, Stream, World, pretended
from safetensors.torch import load_file, save_file

import aoconvert
from aoconvert import accelerators, schemes
from aoconvert.engine import block_quantizer, conversion, quantizer, read_ahead
from aoconvert.engine.acceleration import NoKernels
from aoconvert.engine.assembly import Assembly
from aoconvert.engine.block_quantizer import BlockQuantizer, WeightSlice
from aoconvert.engine.blocks import torchao_at_work
from aoconvert.engine.quantizer import Quantizer
from aoconvert.environment import choose_device
from aoconvert.errors import AoconvertError, DeviceError, DeviceMemoryError, PlanError, QuantizeError
from aoconvert.planning import needs, slices
from aoconvert.progress import Silent
from aoconvert.schemes import Scheme, int4
from aoconvert.schemes.error_stats import ErrorStats
from aoconvert.schemes.tensor_classes import PackedLayout
from aoconvert.searching import measure as measuring
from aoconvert.verification import load_device

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="a torch built for CUDA looks for a driver first"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

BRAIN, SINGLE, HALF = torch.bfloat16, torch.float32, torch.float16
BUSY = torch.AcceleratorError("CUDA error: all CUDA-capable devices are busy or unavailable")
# scheme, settings, layout. HQQ for CUDA is left out: torchao itself asks torch's CUDA build for something
USUAL = [
    ("int8wo", {}, None), ("float8wo", {}, None), ("float8wo", {"granularity": "per_tensor"}, None),
    ("float8dq", {}, None), ("float8dq_block", {}, None), ("nvfp4wo", {}, None), ("mxfp8", {}, None),
    ("int4dq", {}, None), ("int4wo", {}, "cuda"), ("int4wo", {}, "xpu"),
]  # fmt: skip
REST = [
    *((entry.name, {}, None) for entry in schemes.catalogue() if entry.name != "int4wo"),
    ("int8wo", {"granularity": "per_tensor"}, None),
    ("intx4wo", {"intx_choose_qparams_algorithm": "hqq_scale_only"}, None),
]  # fmt: skip
SHAPES = ((384, 512), (200, 256), (3, 128, 256))
Checkpoints = Callable[[str], Path]


@pytest.fixture
def gpu() -> Iterator[World]:
    with pretended() as world:
        yield world


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many slices and blocks of a tiny model."""
    for module in (slices, read_ahead, needs, quantizer):
        monkeypatch.setattr(module, "SLICE_BYTES", 1 << 13)
    for module in (read_ahead, conversion):
        monkeypatch.setattr(module, "READ_AHEAD_BYTES", 1 << 14)
    monkeypatch.setattr(slices, "WHOLE_BYTES", 1 << 14)
    monkeypatch.setattr(block_quantizer, "DEVICE_BLOCK", 1 << 11)


@pytest.fixture(scope="module")
def with_zeros(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with rows of zeros."""
    folder = tmp_path_factory.mktemp("zeros") / "opt"
    shutil.copytree(checkpoints("opt"), folder)
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    for tensor in tensors.values():
        if tensor.dim() == 2:
            tensor[1:3] = 0
    save_file(tensors, file, {"format": "pt"})
    return folder


def locked(weight: torch.Tensor) -> torch.Tensor:
    return accelerators.page_locked(weight.shape, weight.stride(), weight.dtype).copy_(weight)


def weight_of(*shape: int) -> torch.Tensor:
    """Rows of all sizes, some of them zero."""
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator) * torch.logspace(-3, 0, shape[-2])[:, None]
    weight[..., 5:7, :] = 0
    return weight


def digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.bin"))
    assert files
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    components = json.loads((folder / "aoconvert.json").read_text())["components"]
    return {tensor["name"]: tensor for component in components for tensor in component["tensors"]}


def convert(source: Path, output: Path, scheme: str = "int8wo", device: str = "cuda", **options: Any) -> dict[str, str]:
    aoconvert.quantize(source, scheme, output=output, device=device, min_quantized=0, **options)
    return digests(output)


def compare(kind: str, weight: torch.Tensor, base: torch.dtype, scheme: Scheme) -> None:
    """With the CPU: from page-locked memory, and from ordinary memory, some of it transposed."""
    expected = quantize_tensor("w", weight, base, scheme, "cpu")
    elements = 64 * weight.shape[-1]
    with pretended(kind):
        pieces = (locked(weight), weight.mT.contiguous().mT)
        for finish in [begin(BlockQuantizer(f"{kind}:0"), "w", piece, base, scheme, elements) for piece in pieces]:
            made, error = finish()
            assert same(made, expected.tensor), (weight.shape, weight.dtype)
            assert (error.sqnr_db, error.largest) == (expected.sqnr_db, expected.max_abs_error)


def start(
    quantizer: Quantizer, weight: torch.Tensor, scheme: Scheme
) -> Callable[[], tuple[torch.Tensor, ErrorStats, str]]:
    """Begin as a conversion does; what is returned gives the result, its error and the device."""
    with torchao_at_work("w", scheme):
        assembly = Assembly.of(weight.shape, BRAIN, scheme, pinned=quantizer.takes_page_locked(scheme))
    pending = quantizer.start(WeightSlice("w", weight, BRAIN, scheme), assembly.rows(0, len(weight)))

    def wait() -> tuple[torch.Tensor, ErrorStats, str]:
        error, device = pending()
        return assembly.result(), error, device

    return wait


@pytest.mark.parametrize(
    ("name", "settings", "layout"), [*USUAL, *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in REST)]
)
def test_a_lane_gives_what_the_cpu_gives(name: str, settings: dict[str, str], layout: str | None) -> None:
    """Two pieces under way, cut into blocks, rows of zeros in them."""
    scheme = schemes.get(name, settings=settings, layout_device=layout)
    dtypes = ((BRAIN, BRAIN), (SINGLE, BRAIN), (HALF, HALF))
    cells = [
        (kind, shape, source, base)
        for kind, order in (("cuda", dtypes), ("xpu", (dtypes[1], dtypes[0], dtypes[1])))
        for shape, (source, base) in zip(SHAPES, order, strict=True)
        if schemes.blocker(shape, base, scheme) is None
    ]
    assert {kind for kind, *_ in cells} == {"cuda", "xpu"}
    for kind, shape, source, base in cells:
        compare(kind, weight_of(*shape).to(source), base, scheme)


@pytest.mark.parametrize(
    ("name", "settings", "layout"), [*USUAL, *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in REST)]
)
def test_where_a_gpus_division_changes_bytes(
    name: str, settings: dict[str, str], layout: str | None, gpu: World
) -> None:
    """What README says of it: for bfloat16 the CPU's bytes, but for NVFP4's scale of the whole; for float32 others."""
    scheme = schemes.get(name, settings=settings, layout_device=layout)
    gpu.reciprocal = True
    for base in (BRAIN, SINGLE):
        weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(3)).to(base)
        if schemes.blocker((512, 256), base, scheme) is not None:
            continue
        made, _ = begin(BlockQuantizer("cuda:0"), "w", weight, base, scheme, 1 << 20)()
        equal = same(made, quantize_tensor("w", weight, base, scheme, "cpu").tensor)
        if base == BRAIN:
            assert equal != name.startswith("nvfp4")
        elif name in ("int8wo", "float8wo", "int4dq") and not settings:
            assert not equal


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("kind", "count", "device", "scheme"),
    [
        ("cuda", 1, "cuda", "float8wo"),
        ("cuda", 2, "cuda:all", "int8wo"),
        ("xpu", 1, "auto", "float8wo"),
        ("xpu", 2, "xpu:0,xpu:1", "nvfp4wo"),
    ],
)
def test_files_are_the_cpus(kind: str, count: int, device: str, scheme: str, with_zeros: Path, tmp_path: Path) -> None:
    """Slices of rows, streamed results, rows of zeros; on an Intel GPU ordinary memory is late, too."""
    expected = convert(with_zeros, tmp_path / "cpu", scheme, "cpu")
    with pretended(kind, count) as world:
        assert convert(with_zeros, tmp_path / "gpu", scheme, device) == expected
    assert len(world.contexts) == count
    assert all(memory.peak and not memory.used for memory in world.memory.values())
    ours, theirs = entries(tmp_path / "gpu"), entries(tmp_path / "cpu")
    assert ours == theirs
    assert {tensor["device"] for tensor in ours.values()} == {None}


@pytest.mark.usefixtures("small_pieces")
def test_stacked_experts_are_the_cpus(checkpoints: Checkpoints, gpu: World, tmp_path: Path) -> None:
    source = checkpoints("mixtral")
    assert convert(source, tmp_path / "gpu") == convert(source, tmp_path / "cpu", device="cpu")


def test_another_gpu_than_the_first_is_the_only_one_that_is_used(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Page-locked memory would make torch set up the first."""
    with pretended(count=2) as world:
        convert(checkpoints("opt"), tmp_path / "out", device="cuda:1")
        assert [device.index for device in world.contexts] == [1]


def test_int4_for_the_cpu_where_a_gpu_is(checkpoints: Checkpoints, gpu: World, tmp_path: Path) -> None:
    """torchao makes it on a CPU only; plan and manifest say so."""
    options: dict[str, Any] = {"layout_device": "cpu", "group_size": 32}
    expected = convert(checkpoints("opt"), tmp_path / "cpu", "int4wo", "cpu", **options)
    assert convert(checkpoints("opt"), tmp_path / "gpu", "int4wo", "auto", **options) == expected
    assert json.loads((tmp_path / "gpu/aoconvert.json").read_text())["environment"]["device"]["type"] == "cuda"
    found = {(tensor["action"], tensor["device"]) for tensor in entries(tmp_path / "gpu").values()}
    assert ("quantize", "cpu") in found
    assert ("quantize", None) not in found
    plan = aoconvert.plan(checkpoints("opt"), "int4wo", device="auto", min_quantized=0, **options).to_dict()
    assert found == {(tensor["action"], tensor["device"]) for tensor in plan["components"][0]["tensors"]}
    # on its own as well
    scheme = schemes.get("int4wo", layout_device="cpu")
    weight = weight_of(64, 256)
    one, other = (quantize_tensor("w", weight, BRAIN, scheme, device) for device in ("cuda", "cpu"))
    assert same(one.tensor, other.tensor)


@pytest.mark.parametrize("zeros", [False, True])
def test_blocks_shrink_until_they_fit(zeros: bool, gpu: World, caplog: pytest.LogCaptureFixture) -> None:
    """Rows of zeros need no more of the GPU than others."""
    scheme = schemes.get("float8wo")
    weight = torch.randn(2048, 1024).bfloat16()
    if zeros:
        weight[7] = 0
    expected = quantize_tensor("w", weight, BRAIN, scheme, "cpu")
    for limit, device in ((1 << 28, "cuda"), (1 << 22, "cuda"), (1 << 12, "cpu")):
        pool = Quantizer(("cuda:0",), NoKernels(), allow_cpu=True)
        gpu.limit(limit)
        made, error, used = start(pool, locked(weight), scheme)()
        assert same(made, expected.tensor)
        assert (error.sqnr_db, error.repaired, used) == (expected.sqnr_db, int(zeros), device)
        assert ("no memory left" in caplog.text) == (device == "cpu")
    with pytest.raises(DeviceMemoryError, match="cuda:0 has no memory left for w"):
        start(Quantizer(("cuda:0",), NoKernels()), locked(weight), scheme)


class Written(Silent):
    """Waits until some tensors are in their file."""

    def __init__(self) -> None:
        self._left, self._enough = 3, threading.Event()

    def advance(self, nbytes: int, current: str = "") -> None:
        self._left -= 1
        if not self._left:
            self._enough.set()

    def wait(self) -> None:
        assert self._enough.wait(60)


def test_a_gpu_that_fills_up_while_it_works(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """With ``auto`` the CPU goes on, and the manifest names the tensors that it made."""
    source = checkpoints("opt")
    expected = convert(source, tmp_path / "cpu", device="cpu")
    with pretended() as world:
        world.events[6] = lambda: world.limit(0)
        convert(source, tmp_path / "auto", device="auto")
    assert digests(tmp_path / "auto") == expected
    made = [tensor["device"] for tensor in entries(tmp_path / "auto").values() if tensor["action"] == "quantize"]
    assert set(made) == {None, "cpu"}


@pytest.mark.parametrize("fault", ["full", "broken"])
def test_a_gpu_that_is_lost_while_it_works(fault: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """What is finished stays, and the same command continues."""
    source = checkpoints("opt")
    expected = convert(source, tmp_path / "cpu", device="cpu")

    progress = Written()

    def lose() -> None:
        progress.wait()
        if fault == "full":
            world.limit(0)
        else:
            world.broken[torch.device("cuda:0")] = torch.AcceleratorError("CUDA error: unspecified launch failure")

    with pretended() as world, pytest.raises(DeviceError) as caught:
        world.events[9] = lose
        convert(source, tmp_path / "out", progress=progress)
    assert isinstance(caught.value, DeviceMemoryError) == (fault == "full")
    assert "the same command continues" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()
    with pretended():
        result = aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cuda", min_quantized=0)
    assert result.resumed >= 3
    assert digests(tmp_path / "out") == expected
    assert {tensor["device"] for tensor in entries(tmp_path / "out").values()} == {None}


@pytest.mark.parametrize("why", ["busy", "full", "no float64"])
def test_auto_leaves_out_a_gpu_that_cannot_be_used(
    why: str, checkpoints: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A GPU that another process has taken, that is full, or that lacks what is needed."""
    with pretended("xpu" if why == "no float64" else "cuda") as world:
        if why == "busy":
            world.broken[torch.device("cuda:0")] = BUSY
        elif why == "full":
            world.limit(0)
        else:
            world.lacks.add(torch.float64)
        with caplog.at_level(logging.WARNING):
            convert(checkpoints("opt"), tmp_path / "out", device="auto")
        assert "is here, but it cannot be used: " in caplog.text
        with pytest.raises(DeviceError, match=f"{world.kind} cannot be used: ") as caught:
            convert(checkpoints("opt"), tmp_path / "none", device=world.kind)
        assert "--device auto" in (caught.value.hint or "")
    assert json.loads((tmp_path / "out/aoconvert.json").read_text())["environment"]["device"]["type"] == "cpu"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_auto_takes_the_next_gpu() -> None:
    with pretended(count=3) as world:
        assert choose_device("auto") == "cuda"
        world.broken[torch.device("cuda:0")] = BUSY
        world.limit(0, 1)
        assert choose_device("auto") == "cuda:2"


def test_a_gpu_that_was_taken_after_the_plan(
    checkpoints: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Between the choice and the first weight."""
    with pretended(count=2) as world:
        assert quantizer.open_devices(("cuda:0", "cuda:1"), allow_cpu=False) == ("cuda:0", "cuda:1")
        world.broken[torch.device("cuda:0")] = BUSY
        assert quantizer.open_devices(("cuda:0", "cuda:1"), allow_cpu=True) == ("cuda:1",)
        assert quantizer.open_devices(("cuda:0",), allow_cpu=True) == ("cpu",)
        assert "cuda:0 cannot be used: CUDA error: all CUDA-capable devices are busy" in caplog.text
        with pytest.raises(DeviceError):
            quantizer.open_devices(("cuda:1", "cuda:0"), allow_cpu=False)

    class Taken(Silent):
        def start(self, stage: str, total_bytes: int) -> None:
            if stage == "quantize":
                world.broken[torch.device("cuda:0")] = BUSY

    expected = convert(checkpoints("opt"), tmp_path / "cpu", device="cpu")
    with pretended() as world:
        assert convert(checkpoints("opt"), tmp_path / "out", device="auto", progress=Taken()) == expected
    written = json.loads((tmp_path / "out/aoconvert.json").read_text())
    assert written["environment"]["device"]["type"] == "cuda"
    quantized = [tensor for tensor in entries(tmp_path / "out").values() if tensor["action"] == "quantize"]
    assert {tensor["device"] for tensor in quantized} == {"cpu"}


@pytest.mark.usefixtures("small_pieces")
def test_auto_measures_on_a_gpu_what_it_measures_on_the_cpu(with_zeros: Path, tmp_path: Path) -> None:
    """Figures alone come back; candidates for the CPU are measured there."""
    candidates = [schemes.get("int8wo"), schemes.get("float8wo"), schemes.get("mxfp8")]
    candidates.append(schemes.get("int4wo", layout_device="cpu", group_size=32))
    found = {}
    for device in ("cpu", "cuda"):
        with pretended() as world:
            plan = aoconvert.plan(with_zeros, "int8wo", device=device, output=tmp_path / "out")
            tensors = [tensor for tensor in plan.components[0].tensors if tensor.scheme is not None]
            wanted = {
                tensor.name: [each for each in candidates if schemes.blocker(tensor.shape, BRAIN, each) is None]
                for tensor in tensors
            }
            measured = measuring.measure(plan, plan.components[0], wanted, Silent())
        assert not measured.failures
        found[device] = {
            (name, key): (error.sqnr_db, error.largest, error.repaired)
            for name, errors in measured.errors.items()
            for key, error in errors.items()
        }
    assert found["cuda"] == found["cpu"]
    assert len({key for _, key in found["cuda"]}) == len(candidates)
    read = (slices.BUFFERS + slices.PER_DEVICE) * slices.SLICE_BYTES
    assert 0 < world.locked_bytes < read + 24 * 4 * len(found["cuda"])  # three figures a piece; results would be more


def test_what_torchao_cannot_do_is_an_error_by_name(gpu: World) -> None:
    """So that a search leaves the candidate out, as on a CPU: torchao leaves this weight as it is, or fails."""
    for name, shape, why in (("float8dq", (24, 24), "left w unquantized"), ("int8dq_int8", (8, 3), "failed")):
        scheme, weight = schemes.get(name), torch.randn(shape).bfloat16()
        for device in ("cpu", "cuda:0"):
            with pytest.raises(QuantizeError, match=rf"w.*{why}|{why}"):
                start(Quantizer((device,), NoKernels()), weight, scheme)()


def test_nan_is_named(gpu: World) -> None:
    weight = torch.ones(8, 256)
    weight[3, 3] = torch.nan
    pool, scheme = Quantizer(("cuda:0",), NoKernels()), schemes.get("float8wo")
    measured = pool.start(WeightSlice("w", locked(weight), BRAIN, scheme), None)
    for finish in (start(pool, locked(weight), scheme), measured):
        with pytest.raises(QuantizeError, match="w holds NaN or infinity"):
            finish()


@pytest.mark.parametrize(("name", "layout"), [("int8wo", None), ("nvfp4wo", None), ("mxfp8", None), ("int4wo", "cuda")])
def test_the_plan_promises_what_a_gpu_takes(
    name: str, layout: str | None, gpu: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of tensors, exactly counted; what torch's allocator keeps beside them is not."""
    monkeypatch.setattr(block_quantizer, "DEVICE_BLOCK", 1 << 18)
    scheme = schemes.get(name, layout_device=layout)
    weight = locked(torch.randn(1024, 1024).bfloat16())
    pool = Quantizer(("cuda:0",), NoKernels())
    for finish in [start(pool, weight, scheme) for _ in range(slices.PER_DEVICE)]:
        finish()
    peak = gpu.memory[torch.device("cuda:0")].peak
    promised = block_quantizer.DEVICE_BLOCK * scheme.entry.device_block_bytes
    assert 0.7 * promised < peak <= promised


def test_the_plan_counts_a_gpus_share_of_memory(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """A context, lanes, page-locked buffers for each GPU; tensors that a CPU quantizes take nothing of it."""
    planned = {}
    for count, device, options in (
        (1, "cpu", {}), (1, "cuda", {}), (2, "cuda:all", {}), (1, "auto", {"layout_device": "cpu", "group_size": 32}),
    ):  # fmt: skip
        with pretended(count=count):
            scheme = "int4wo" if options else "int8wo"
            plan = aoconvert.plan(
                checkpoints("opt"), scheme, device=device, output=tmp_path, overwrite=True, min_quantized=0, **options
            )
        planned[device] = plan.needs
    context = planned["auto"].device_peak_bytes
    assert planned["cpu"].device_peak_bytes == 0 < context
    largest = 32 * 64
    assert planned["cuda"].device_peak_bytes == context + slices.PER_DEVICE * 26 * largest
    assert planned["cuda:all"].device_peak_bytes == planned["cuda"].device_peak_bytes
    more = planned["cuda:all"].host_peak_bytes - planned["cuda"].host_peak_bytes
    assert slices.PER_DEVICE * slices.SLICE_BYTES <= more < slices.PER_DEVICE * slices.SLICE_BYTES + 100_000
    assert planned["cuda"].host_peak_bytes > planned["cpu"].host_peak_bytes + 5 * slices.SLICE_BYTES


def test_amds_gpus_do_not_read_nvidias_layout(gpu: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls them ``cuda`` as well, and (9, 0) is no compute capability of theirs."""
    layouts = [PackedLayout("cuda", (8, 0)), PackedLayout("any", (8, 9))]
    assert [load_device._obstacle(layout, "cuda") for layout in layouts] == [None, None]
    monkeypatch.setattr(accelerators, "capability", lambda device: None)
    for layout in layouts:
        assert "for NVIDIA's GPUs" in (load_device._obstacle(layout, "cuda") or "")
    assert int4.unavailable("cuda") is None
    monkeypatch.setattr(int4, "torch_build", lambda: "rocm6.4")
    with pytest.raises(PlanError, match=r"int4wo does not run here: .*AMD"):
        schemes.get("int4wo", layout_device="cuda")


# Planted mistakes: what the instrument does not see, it does not prove.


def begun(scheme: Scheme, weight: torch.Tensor) -> Callable[[], tuple[torch.Tensor, Any]]:
    return begin(BlockQuantizer("cuda:0"), "w", weight, BRAIN, scheme, 16 * weight.shape[1])


def test_a_result_that_was_not_waited_for_is_seen(gpu: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "record_event", lambda self: None)
    scheme, weight = schemes.get("int8wo"), locked(weight_of(64, 256))
    expected = quantize_tensor("w", weight, BRAIN, scheme, "cpu")
    try:
        made, error = begun(scheme, weight)()
    except AoconvertError:
        return
    assert not same(made, expected.tensor)
    assert error.sqnr_db != expected.sqnr_db


def test_a_buffer_that_is_overwritten_early_is_seen(gpu: World) -> None:
    weight = locked(weight_of(64, 256))
    finish = begun(schemes.get("int8wo"), weight)
    weight.zero_()
    with pytest.raises(Mistake, match="written to before"):
        finish()


def test_a_wrong_stream_is_seen(gpu: World, monkeypatch: pytest.MonkeyPatch) -> None:
    count = block_quantizer.error_figures

    def elsewhere(original: torch.Tensor, *arguments: Any) -> torch.Tensor:
        other: AbstractContextManager[Any] = accelerators.new_stream(original.device)
        with other:
            return count(original, *arguments)

    monkeypatch.setattr(block_quantizer, "error_figures", elsewhere)
    with pytest.raises(Mistake, match="used on another"):
        begun(schemes.get("int8wo"), locked(weight_of(64, 256)))


def test_mixed_devices_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(count=2):
        one, other = (torch.ones(2, device=f"cuda:{index}") for index in (0, 1))
        assert isinstance(one, OnDevice)
        for wrong in (other, torch.ones(2)):
            with pytest.raises(RuntimeError, match="same device"):
                one + wrong
        monkeypatch.setattr(Scheme, "cpu_only", False)
        with pytest.raises(QuantizeError, match="same device"):
            begun(schemes.get("int4wo", layout_device="cpu"), locked(weight_of(64, 256)))


def test_memory_is_counted(gpu: World) -> None:
    memory = gpu.memory[torch.device("cuda:0")]
    one = torch.ones(1000, device="cuda")
    view = one[:10]
    assert (memory.used, memory.peak) == (4096, 4096)
    del one
    assert memory.used == 4096
    del view
    assert (memory.used, memory.peak) == (0, 4096)
    gpu.limit(100)
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(1000, device="cuda")


def test_there_is_no_such_device_outside() -> None:
    with pytest.raises(PlanError, match="device cuda is not available"):
        choose_device("cuda")
