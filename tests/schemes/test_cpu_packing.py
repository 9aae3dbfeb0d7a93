"""The CPU's layouts against the op itself, under each instruction set that this machine can be made to use."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aoconvert.schemes import cpu_packing

ROWS = (16, 32, 48, 64, 80, 112, 128, 208)
# packs what it is given with the op, and says which layout it found
CHILD = """
import json, sys, torch
from aoconvert.schemes import cpu_packing
op = torch.ops.aten._convert_weight_to_int4pack_for_cpu
words = [op(torch.tensor(codes, dtype=torch.int32), 1).tolist() for codes in json.load(sys.stdin)]
print(json.dumps([cpu_packing.machine_layout(), torch.backends.cpu.get_cpu_capability(), words]))
"""


def random_codes(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("capability", [pytest.param("avx2", marks=pytest.mark.exhaustive), "default"])
def test_a_layout_is_what_the_op_writes_with_these_instructions(capability: str) -> None:
    weights = [random_codes(rows, 6) for rows in ROWS]
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps([codes.tolist() for codes in weights]),
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=True,
    )
    layout, found, words = json.loads(done.stdout)
    if found != capability.upper():
        pytest.skip(f"this CPU has no {capability}")
    assert layout == (capability if capability != "default" else "pairs32")
    assert [cpu_packing.pack(codes, layout).tolist() for codes in weights] == words


@settings(deadline=None)
@given(st.sampled_from(ROWS), st.integers(0, 5), st.integers(0, 2**30))
def test_this_machines_layout_is_what_the_op_writes_here(rows: int, half: int, seed: int) -> None:
    codes = random_codes(rows, 2 * half, seed)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    assert torch.equal(cpu_packing.pack(codes, cpu_packing.machine_layout()), packed)


@settings(deadline=None)
@given(st.sampled_from(ROWS), st.integers(0, 5), st.sampled_from(cpu_packing.LAYOUTS), st.integers(0, 2**30))
def test_unpacking_gives_the_codes(rows: int, half: int, layout: str, seed: int) -> None:
    codes = random_codes(rows, 2 * half, seed)
    assert torch.equal(cpu_packing.unpack(cpu_packing.pack(codes, layout), layout), codes)


def test_every_layout_is_another_one() -> None:
    codes = random_codes(112, 4)
    packed = [cpu_packing.pack(codes, layout) for layout in cpu_packing.LAYOUTS]
    assert all(not torch.equal(one, other) for at, one in enumerate(packed) for other in packed[:at])


@pytest.mark.parametrize("shape", [(8, 4), (16, 3), (24, 2)])
def test_a_shape_that_the_op_refuses_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError):
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.zeros(shape, dtype=torch.int32), 1)
    with pytest.raises(ValueError, match="multiple of 16"):
        cpu_packing.pack(torch.zeros(shape, dtype=torch.uint8), "avx2")
