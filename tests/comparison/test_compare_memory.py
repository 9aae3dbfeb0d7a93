"""A comparison takes the memory of a few rows, whatever the files hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aoconvert.environment import import_torchao

SCRIPT = """
import json, sys, threading, os
import aoconvert
from aoconvert.memory import anonymous_bytes
peak, over = 0, threading.Event()
def watch():
    global peak
    while not over.wait(0.01):
        peak = max(peak, anonymous_bytes(os.getpid()))
thread = threading.Thread(target=watch); thread.start()
found = aoconvert.diff(sys.argv[1], sys.argv[2])
over.set(); thread.join()
print(json.dumps([peak, found.same, [[item.name, item.what, item.sqnr_db] for item in found.different]]))
"""


def write(path: Path, shapes: list[tuple[int, int]], changed: int) -> None:
    """Int8 weights, one tensor at a time; ``changed`` is added to a code of each."""
    import_torchao()
    from torchao.quantization import Int8Tensor

    from aoconvert.formats.torch_bin.writer import TorchBinWriter

    with TorchBinWriter(path) as writer:
        for number, (rows, columns) in enumerate(shapes):
            codes = torch.randint(-127, 120, (rows, columns), dtype=torch.int8)
            codes[-1, -1] = 3 + changed
            scale = torch.full((rows, 1), 0.01, dtype=torch.bfloat16)
            writer.add(f"{number}.weight", Int8Tensor(codes, scale, [1, columns], torch.bfloat16))
        writer.seal()


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("shapes", [[(8192, 8192)] * 15, [(262144, 4000)]], ids=["layers", "one embedding"])
def test_a_pair_of_a_gigabyte(shapes: list[tuple[int, int]], tmp_path: Path) -> None:
    for name, changed in (("a.bin", 0), ("b.bin", 1)):
        torch.manual_seed(0)
        write(tmp_path / name, shapes, changed)
    assert (tmp_path / "a.bin").stat().st_size > 1e9
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "a.bin"), str(tmp_path / "b.bin")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, same, different = json.loads(done.stdout)
    assert same == 0
    assert [what for _, what, _ in different] == ["codes"] * len(shapes)
    assert peak < 600e6
