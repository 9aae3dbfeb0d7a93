"""Compiled kernels give torchao's own bits, and nothing that goes wrong with them costs more than time."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.one_tensor import quantize_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

import aoconvert
from aoconvert import schemes
from aoconvert.errors import QuantizeError
from aoconvert.kernels import library
from aoconvert.kernels.checked import Checked, Kernels
from aoconvert.schemes.apply import flatten, quantize_weight
from aoconvert.schemes.error_stats import ErrorStats

# scheme, group size, settings, source dtype, base dtype
Case = tuple[str, int | None, tuple[tuple[str, str], ...], torch.dtype, torch.dtype]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8: Case = ("int8wo", None, (), BF16, BF16)
INT4: Case = ("int4dq", 64, (), FP16, BF16)
ASYMMETRIC = (("mapping_type", "ASYMMETRIC"),)
REST: list[Case] = [
    ("int8wo", None, (), FP32, BF16), ("int8wo", None, (), FP32, FP16), ("int8wo", None, (), FP32, FP32),
    ("int8wo", None, (), FP16, FP16), ("int8wo", None, (), BF16, FP16), ("int8wo", 32, (), BF16, BF16),
    ("int8dq", None, (), BF16, BF16), ("float8wo", None, (), BF16, BF16), ("float8wo", None, (), FP32, FP16),
    ("float8wo", 64, (), BF16, BF16), ("float8wo_e5m2", None, (), BF16, BF16), ("float8wo_e5m2", None, (), FP32, FP32),
    ("int4dq", None, (), BF16, BF16), ("int4dq", 32, (("weight_mapping_type", "ASYMMETRIC"),), BF16, BF16),
    ("int4dq", 32, (), FP32, FP32), ("int4dq", 64, (), FP16, FP16),
    *((f"intx{bits}wo", None, (), BF16, BF16) for bits in range(1, 9)),
    ("intx4wo", 32, ASYMMETRIC, BF16, BF16), ("intx2wo", 64, (), BF16, BF16), ("intx4wo", 32, ASYMMETRIC, FP32, FP32),
]  # fmt: skip
CASES = [INT8, *(pytest.param(case, marks=pytest.mark.exhaustive) for case in [INT4, *REST])]  # each compiles
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")


def scheme_of(case: Case) -> schemes.Scheme:
    return schemes.get(case[0], group_size=case[1], settings=dict(case[2]))


@dataclass
class Built:
    """A cache folder with compiled kernels; each is compiled once a session, in the background as in a real run."""

    folder: Path
    eager_first: dict[Case, bool] = field(default_factory=dict)

    def __call__(self, case: Case) -> Path:
        """The folder, with the kernel of ``case`` in it."""
        if case not in self.eager_first:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("AOCONVERT_CACHE_DIR", str(self.folder))
                patch.setenv("AOCONVERT_COMPILE", "auto")
                self._build(case)
        return self.folder

    def _build(self, case: Case) -> None:
        with Kernels("cpu", {scheme_of(case).key: 10**11}) as kernels:
            self.eager_first[case] = kernels.for_tensor(scheme_of(case), *case[3:]) is None
            deadline = time.monotonic() + 300
            while kernels.for_tensor(scheme_of(case), *case[3:]) is None and time.monotonic() < deadline:
                time.sleep(0.1)
            assert kernels.for_tensor(scheme_of(case), *case[3:]) is not None


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of one test's own; kernels are switched on."""
    monkeypatch.setenv("AOCONVERT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("AOCONVERT_COMPILE", "auto")
    folder = tmp_path / "cache" / "kernels"
    folder.mkdir(mode=0o700, parents=True)
    return folder


def library_of(folder: Path, case: Case) -> Path:
    """The file of a case's kernel."""
    [path] = (folder / "kernels").glob(f"{library._key(scheme_of(case), *case[3:])}.*.so")
    return path


def install(content: bytes, folder: Path, case: Case) -> Path:
    """Put a library into a cache as the kernel of ``case``."""
    key = library._key(scheme_of(case), *case[3:])
    path = folder / f"{key}.{hashlib.sha256(content).hexdigest()}.so"
    path.write_bytes(content)
    return path


def load(folder: Path, case: Case) -> library.Kernel:
    found = library._load(folder / "kernels", library._key(scheme_of(case), *case[3:]))
    assert found is not None
    return found


def weights(rows: int, columns: int, dtype: torch.dtype, seed: int, scale: float, special: list[float]) -> torch.Tensor:
    """Normal values with some others strewn in; finite in ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * scale
    places = torch.randint(weight.numel(), (len(special),), generator=generator)
    weight.view(-1)[places] = torch.tensor(special, dtype=torch.float32)
    weight[seed % rows] = special[0] if special and seed % 3 == 0 else weight[seed % rows]
    limit = torch.finfo(dtype).max
    return weight.clamp(-limit, limit).to(dtype)


def eager(weight: torch.Tensor, case: Case) -> tuple[dict[str, torch.Tensor], ErrorStats]:
    quantized = quantize_weight(weight.to(case[4]), scheme_of(case))
    error = ErrorStats()
    error.add(weight, quantized)
    return {name: getattr(quantized, name) for name in flatten(quantized)[0]}, error


SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 6e-8, 1e-30, 1.0, -65504.0, 3e38, -3.3e38]


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part) for part in case))
def test_kernels_give_torchaos_bits(case: Case, built: Built) -> None:
    """Every shape, every value that a weight can have, one and two threads."""
    kernel = load(built(case), case)
    group = scheme_of(case).group_size or 1
    before = torch.get_num_threads()

    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.integers(2, 90),
        groups=st.integers(1, 6 if group > 1 else 400),
        scale=st.sampled_from([1e-38, 1e-6, 0.02, 1.0, 3e4, 1e38]),
        special=st.lists(st.sampled_from(SPECIAL), max_size=8),
        threads=st.sampled_from([1, 2]),
        seed=st.integers(0, 2**31),
    )
    def check(rows: int, groups: int, scale: float, special: list[float], threads: int, seed: int) -> None:
        weight = weights(rows, max(2, groups * group), case[3], seed, scale, special)
        torch.set_num_threads(threads)
        done = kernel.rows(weight)
        parts, error = eager(weight, case)
        assert ErrorStats(done.signal, done.noise).finite == error.finite
        if not error.finite:  # the cast overflows, or float8 has no scale for zeros: refused
            return
        for ours, (name, theirs) in zip(done.parts, parts.items(), strict=True):
            assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride()), name
            assert torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)), name
        assert done.signal == pytest.approx(error.signal, rel=1e-12, abs=0)
        assert done.noise == pytest.approx(error.noise, rel=1e-12, abs=0)
        assert done.largest == error.largest
        assert ErrorStats(done.signal, done.noise).sqnr_db == error.sqnr_db

    try:
        check()
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_a_kernel_does_not_hold_the_interpreters_lock(built: Built) -> None:
    kernel = load(built(INT8), INT8)
    weight = torch.ones(60_000, 1024, dtype=BF16)
    beats: list[float] = []
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.001):
            beats.append(time.perf_counter())

    thread = threading.Thread(target=beat)
    thread.start()
    began = time.perf_counter()
    kernel.rows(weight)
    ended = time.perf_counter()
    stop.set()
    thread.join()
    # without the lock the thread would beat twice at most: as the call begins and as it ends
    assert sum(began < moment < ended for moment in beats) >= 5


@needs_compiler
def test_loading_a_kernel_leaves_denormals_alone(built: Built) -> None:
    """GCC's fast-math start-up code would flush them to zero in the whole process."""
    load(built(INT8), INT8).rows(torch.ones(4, 64, dtype=BF16))
    assert (torch.tensor([1e-40, 1e-45]) * 1).tolist() == torch.tensor([1e-40, 1e-45]).tolist() != [0, 0]


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 64), (5, 64), (700, 1024), (3, 192), (40, 2), (3, 20, 64)])
def test_tensors_are_those_of_the_eager_way(
    shape: tuple[int, ...], built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row goes the eager way; the others are torchao's class with torchao's attributes."""
    monkeypatch.setenv("AOCONVERT_CACHE_DIR", str(built(INT8)))
    monkeypatch.setenv("AOCONVERT_COMPILE", "auto")
    scheme = scheme_of(INT8)
    with Kernels("cpu", {}) as kernels:
        kernel = kernels.for_tensor(scheme, BF16, BF16)
        assert kernel is not None
        weight = torch.randn(shape).bfloat16()
        first = torch.randn(50, 64).bfloat16()
        for tensor in (first, weight, weight):
            ours = quantize_tensor("w", tensor, BF16, scheme, "cpu", kernel=kernel)
            theirs = quantize_tensor("w", tensor, BF16, scheme, "cpu")
            assert (ours.sqnr_db, ours.max_abs_error) == (theirs.sqnr_db, theirs.max_abs_error)
            assert type(ours.tensor) is type(theirs.tensor)
            assert str(flatten(ours.tensor)) == str(flatten(theirs.tensor))
            assert (ours.tensor.shape, ours.tensor.stride()) == (theirs.tensor.shape, theirs.tensor.stride())
            assert torch.equal(ours.tensor.dequantize(), theirs.tensor.dequantize())
        flat = weight.reshape(-1, shape[-1])  # stacked experts are rows to it
        assert (kernel.quantize(flat) is None) == (len(flat) == 1)
        assert not kernel.dropped


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_refused_as_the_eager_way_does(value: float, built: Built) -> None:
    """And the kernel stays in use: what it makes of NaN is not compared."""
    checked = Checked(load(built(INT8), INT8), scheme_of(INT8), BF16)
    weight = torch.ones(40, 64, dtype=BF16)
    weight[33, 5] = value
    with pytest.raises(QuantizeError, match="fc holds NaN or infinity"):
        quantize_tensor("fc", weight, BF16, scheme_of(INT8), "cpu", kernel=checked)
    assert not checked.dropped
    assert checked.quantize(torch.randn(40, 64).bfloat16()) is not None


WRONG: Case = ("int4dq", 64, (("weight_mapping_type", "ASYMMETRIC"),), FP16, BF16)


@needs_compiler
@pytest.mark.parametrize("real", [pytest.param(INT4, marks=pytest.mark.exhaustive), INT8])
def test_a_kernel_with_other_bits_is_dropped(
    real: Case, built: Built, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another scheme's library under a scheme's key: the symmetric one for the asymmetric, and one of other parts."""
    install(library_of(built(real), real).read_bytes(), cache, WRONG)
    scheme = scheme_of(WRONG)
    weight = torch.randn(90, 128, generator=torch.Generator().manual_seed(1)).half()
    with Kernels("cpu", {}) as kernels, caplog.at_level(logging.WARNING):
        kernel = kernels.for_tensor(scheme, FP16, BF16)
        assert kernel is not None
        ours = quantize_tensor("w", weight, BF16, scheme, "cpu", kernel=kernel)
        assert kernel.dropped
        assert kernel.quantize(weight) is None
        assert kernels.for_tensor(scheme, FP16, BF16) is kernel
    assert "the compiled kernel int4dq is no longer used" in caplog.text
    theirs = quantize_tensor("w", weight, BF16, scheme, "cpu")
    assert torch.equal(ours.tensor.dequantize(), theirs.tensor.dequantize())
    assert ours.sqnr_db == theirs.sqnr_db


@needs_compiler
@pytest.mark.exhaustive
def test_every_new_width_is_checked(built: Built, caplog: pytest.LogCaptureFixture) -> None:
    """Right for the first tensor, wrong for a later width: a real kernel of another scheme from there on."""
    right, wrong = load(built(INT4), INT4), scheme_of(WRONG)
    checked = Checked(right, scheme_of(INT4), BF16)
    weight = torch.randn(50, 128, generator=torch.Generator().manual_seed(1)).half()
    assert checked.quantize(weight) is not None
    checked._scheme = wrong
    assert checked.quantize(weight) is not None  # this width has been checked
    assert checked.quantize(weight[:, :64].contiguous()) is None
    assert checked.dropped
    assert "is not torchao's" in caplog.text


@pytest.mark.parametrize("compiler", ["/bin/false", "no-such-compiler"])
def test_without_a_compiler_there_is_no_kernel(
    compiler: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("AOCONVERT_COMPILE", "1")
    with Kernels("cpu", {scheme_of(INT8).key: 1}) as kernels, caplog.at_level(logging.DEBUG, "aoconvert"):
        assert kernels.for_tensor(scheme_of(INT8), BF16, BF16) is None
        assert kernels.for_tensor(scheme_of(INT8), BF16, BF16) is None
    assert caplog.text.count("no kernel:") == 1
    assert not list(cache.glob("*.so"))


@needs_compiler
@pytest.mark.parametrize("damage", [lambda content: content[:5000], lambda content: content[:-1], lambda _: b""])
def test_a_damaged_library_is_removed(damage: Callable[[bytes], bytes], built: Built, cache: Path) -> None:
    content = library_of(built(INT8), INT8).read_bytes()
    path = install(content, cache, INT8)
    path.write_bytes(damage(content))
    assert library.get(scheme_of(INT8), BF16, BF16) is None
    assert not path.exists()


def test_what_is_no_library_is_removed(cache: Path) -> None:
    path = install(b"not a library", cache, INT8)
    assert library.get(scheme_of(INT8), BF16, BF16) is None
    assert not path.exists()


@needs_compiler
@pytest.mark.parametrize("how", ["group", "world", "link", "owner"])
def test_a_folder_that_others_can_write_is_refused(
    how: str, built: Built, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(library_of(built(INT8), INT8).read_bytes(), cache, INT8)
    assert library.get(scheme_of(INT8), BF16, BF16) is not None
    if how == "link":
        cache.rename(cache.with_name("elsewhere"))
        cache.symlink_to(cache.with_name("elsewhere"))
    elif how == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(cache, 65534, 65534)
    else:
        cache.chmod(0o770 if how == "group" else 0o707)
    assert library.get(scheme_of(INT8), BF16, BF16) is None
    assert "mode 0700" in caplog.text
    building = library.start(scheme_of(INT8), BF16, BF16)
    assert building.done
    assert building.ready() is None


@needs_compiler
def test_a_large_model_starts_eager_and_switches(cache: Path) -> None:
    """A small model does not start a child; the child outlives the run, and leaves nothing where it is ended."""
    scheme = scheme_of(INT8)
    with Kernels("cpu", {scheme.key: 10**6}) as kernels:
        assert kernels.for_tensor(scheme, BF16, BF16) is None
        assert not kernels._found[scheme.key, BF16, BF16]
    with Kernels("cpu", {scheme.key: 10**11}) as kernels:
        assert kernels.for_tensor(scheme, BF16, BF16) is None
        building = kernels._found[scheme.key, BF16, BF16]
        assert isinstance(building, library.Building)
        assert building._process is not None
        child = building._process.pid
        assert kernels.for_tensor(scheme, BF16, BF16) is None  # nobody waits: the child has not ended
        assert not building.done
    os.killpg(child, 0)  # it goes on
    building.cancel()
    with pytest.raises(ProcessLookupError):
        os.killpg(child, 0)
    assert not list(cache.glob("*.so"))


@needs_compiler
def test_a_kernel_that_pays_only_in_the_next_run_is_built_when_this_one_is_over(cache: Path) -> None:
    """Of 3 GB, all of which go eager; of 1 GB none is built, and of 5 GB it has been built by then."""
    scheme, key = scheme_of(INT8), (scheme_of(INT8).key, BF16, BF16)
    for size in (10**9, 5 * 10**9):
        with Kernels("cpu", {scheme.key: size}) as kernels:
            kernels.prepare(scheme, BF16, BF16)
            assert key not in kernels._found
    with Kernels("cpu", {scheme.key: 3 * 10**9}) as kernels:
        assert kernels.for_tensor(scheme, BF16, BF16) is None
        assert kernels._found[key] is None
    with Kernels("cpu", {scheme.key: 3 * 10**9}) as kernels:
        kernels.prepare(scheme, BF16, BF16)
        building = kernels._found[key]
        assert isinstance(building, library.Building)
        assert building._process is not None
        kernels.prepare(scheme, BF16, BF16)
        assert kernels._found[key] is building
    building.cancel()


@needs_compiler
def test_the_switch_comes_when_the_library_is_there(built: Built) -> None:
    path = library_of(built(INT8), INT8)
    assert built.eager_first[INT8]
    assert (path.stat().st_uid, path.parent.stat().st_mode & 0o777) == (os.geteuid(), 0o700)
    assert not list(path.parent.glob("*.tmp"))


@pytest.mark.parametrize(("choice", "device", "name"), [("0", "cpu", "int8wo"), ("1", "cuda", "int8wo")])
def test_kernels_are_for_the_cpu_and_can_be_switched_off(
    choice: str, device: str, name: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AOCONVERT_COMPILE", choice)
    with Kernels(device, {schemes.get(name).key: 10**12}) as kernels:
        assert kernels.for_tensor(schemes.get(name), BF16, BF16) is None
    assert not list(cache.iterdir())


def test_schemes_that_take_the_whole_weight_have_no_kernel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AOCONVERT_COMPILE", "1")
    with Kernels("cpu", {}) as kernels:
        assert kernels.for_tensor(schemes.get("int8wo", settings={"granularity": "per_tensor"}), BF16, BF16) is None
    assert not list(cache.iterdir())


def test_the_key_tells_everything_apart() -> None:
    cases = [INT8, INT4, WRONG, *REST]
    keys = {library._key(scheme_of(case), *case[3:]) for case in cases}
    assert len(keys) == len(cases)


@needs_compiler
def test_a_run_writes_the_same_files(
    built: Built, checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same manifest, error figures included, but for the times."""
    monkeypatch.setenv("AOCONVERT_CACHE_DIR", str(built(INT8)))
    calls = []
    quantize = Checked.quantize

    def counted(self: Checked, weight: torch.Tensor) -> Any:
        calls.append(self)
        return quantize(self, weight)

    monkeypatch.setattr(Checked, "quantize", counted)
    seen: list[tuple[Mapping[str, Any], dict[str, bytes]]] = []
    for choice in ("0", "1"):
        monkeypatch.setenv("AOCONVERT_COMPILE", choice)
        output = tmp_path / "out"
        result = aoconvert.quantize(checkpoints("llama-tied"), "int8wo", output=output, device="cpu", dtype="bfloat16")
        document = result.manifest.model_dump(mode="json")
        document.pop("run")
        files = {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()}
        files.pop("aoconvert.json")
        seen.append((document, files))
        output.rename(tmp_path / f"out-{choice}")
        assert bool(calls) == (choice == "1")
    assert not calls[0].dropped
    assert seen[0] == seen[1]
