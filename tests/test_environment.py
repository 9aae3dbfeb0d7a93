import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import aoconvert
from aoconvert.environment import (
    choose_device,
    device_facts,
    platform_name,
    quiet_imports,
    version_at_least,
    version_of,
    versions,
)
from aoconvert.errors import PlanError, UsageError

ROOT = Path(__file__).parents[1]


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_versions() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    for package in ("torch", "torchao", "diffusers", "transformers", "accelerate", "huggingface_hub"):
        assert found[package] == importlib.metadata.version(package)
    assert found["aoconvert"] == aoconvert.__version__


def test_versions_import_nothing_heavy() -> None:
    done = run(
        "import sys; from aoconvert.environment import *; versions(); platform_name(); device_facts('cpu');"
        "heavy = {'torch', 'torchao', 'diffusers', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("package", "minimum", "expected"),
    [
        ("torch", "2.9", True),  # 2.13 < 2.9 as strings
        ("torch", "2.11.0", True),
        ("torchao", "0.2", True),  # 0.18 < 0.2 as strings
        ("torchao", "0.100", False),
        ("torch", "99", False),
        ("no-such-package-anywhere", "0", False),
    ],
)
def test_version_at_least(package: str, minimum: str, expected: bool) -> None:
    assert version_at_least(package, minimum) is expected


def test_a_version_is_at_least_itself() -> None:
    for package in ("torch", "torchao"):
        version = version_of(package)
        assert version is not None
        assert version_at_least(package, version)


def test_nothing_names_this_machine() -> None:
    texts = [platform_name(), device_facts("cpu").name]
    assert platform.system() in texts[0]
    assert platform.machine() in texts[0]
    assert all(texts)
    if len(platform.node()) > 3:
        assert not any(platform.node() in text for text in texts)
    assert not any(str(Path.home()) in text for text in texts)


def test_the_cpu_is_a_model_name() -> None:
    facts = device_facts("cpu")
    assert (facts.type, facts.capability) == ("cpu", None)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and "model name" in cpuinfo.read_text():
        assert facts.name in cpuinfo.read_text()


def test_auto_takes_the_best_device() -> None:
    best = "cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu"
    assert choose_device("auto") == best
    assert device_facts("auto").type == best
    assert choose_device("cpu") == "cpu"


@pytest.mark.parametrize(
    "name", ["tpu", "", "cuda:", "cuda:x", "cuda:-1", "cuda:1:2", "cpu:0", "CUDA", "cuda:²", "gpu\n"]
)
def test_what_is_no_device(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose_device(name)
    assert len(caught.value.message.splitlines()) == 1
    assert "cuda:N" in (caught.value.hint or "")


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_device_that_is_not_here(kind: str) -> None:
    absent = f"{kind}:{getattr(torch, kind).device_count()}"
    for ask in (choose_device, device_facts):
        with pytest.raises(PlanError, match=f"device {absent} is not available: torch sees") as caught:
            ask(absent)
        assert caught.value.exit_code == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device() -> None:
    facts = device_facts("cuda:0")
    assert facts.type == choose_device("cuda") == "cuda"
    assert facts.name == torch.cuda.get_device_name(0)
    assert facts.capability == torch.cuda.get_device_capability(0)


@pytest.mark.parametrize("module", ["torchao", "diffusers"])
def test_imports_are_quiet(module: str) -> None:
    done = run(f"from aoconvert.environment import import_{module} as load; print(load().__name__)")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{module}\n", "")


@pytest.mark.parametrize(
    ("logger", "noise"),
    [
        ("torchao", "Failed to load /x/_C_mxfp8.cpython-310-x86_64-linux-gnu.so: Could not load this library"),
        ("torch.utils._pytree", "<enum 'E'> is an Enum subclass and is now natively supported by torch.compile as"),
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: No module"),
        (
            "diffusers.quantizers.torchao.torchao_quantizer",
            "Unable to import `torchao` Tensor objects. This may affect",
        ),
    ],
)
def test_only_the_known_message_is_dropped(logger: str, noise: str) -> None:
    seen: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    log, handler = logging.getLogger(logger), Keep()
    log.addHandler(handler)
    try:
        with quiet_imports():
            log.warning("%s", noise)
            log.warning("something else")
        log.warning("%s", noise)
    finally:
        log.removeHandler(handler)
    assert seen == ["something else", noise]


def test_filters_are_removed_after_an_error() -> None:
    before = list(logging.getLogger("torchao").filters)
    with pytest.raises(KeyError), quiet_imports():
        raise KeyError
    assert logging.getLogger("torchao").filters == before
