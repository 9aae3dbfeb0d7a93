import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scheme_table import ROWS, VARIANTS, Row, attributes, get, inner, quantize, variant_id
from torchao.core.config import config_from_dict, config_to_dict

from aoconvert import schemes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWWISE = [made for made in map(get, VARIANTS) if made.rowwise]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)


def weight(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of very different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows)[:, None]
    if rows > 2:
        made[seed % rows] = 0
    return made.to(dtype)


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit: NaN equals NaN, -0 does not equal 0."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def pieces_equal_whole(made: torch.Tensor, config: Any, cuts: list[int]) -> bool:
    """Whether quantizing blocks of rows and concatenating their inner tensors gives the whole."""
    whole = quantize(made, config)
    edges = [0, *cuts, made.shape[0]]
    blocks = [quantize(made[i:j].clone(), config) for i, j in itertools.pairwise(edges)]
    if any(attributes(block) != attributes(whole) or inner(block).keys() != inner(whole).keys() for block in blocks):
        return False
    return all(
        same_bytes(torch.cat([inner(block)[name] for block in blocks]), tensor) for name, tensor in inner(whole).items()
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.scheme)
def test_defaults(row: Row) -> None:
    made = schemes.get(row.scheme)
    assert type(made.config).__name__ == row.config
    assert made.config.version == 2
    assert (made.name, made.tensor_class, made.weight_dtype) == (row.scheme, row.tensor_class, row.weight_dtype)
    assert (made.activation, made.granularity) == (row.activation, row.granularity)
    assert (made.ranks, made.needs_rows, made.bits) == (row.ranks, row.needs_rows, 8.0)
    assert (made.min_torchao, made.layout.requires) == (row.min_torchao, (f"torchao>={row.min_torchao}",))
    assert (made.layout.device, made.layout.min_capability) == ("any", None)
    assert made.summary == schemes.find(row.scheme).summary


@variants
def test_config_round_trip(variant: Any) -> None:
    made = get(variant)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_from_dict(made.config_dict) == made.config
    assert config_to_dict(made.config) == made.config_dict
    assert json.loads(json.dumps(made.config_dict)) == made.config_dict


@variants
def test_description_is_what_torchao_makes(variant: Any) -> None:
    made = get(variant)
    columns = 6 * (made.group_size or 5)
    whole = quantize(weight(9, columns, torch.bfloat16, 1), made.config)
    assert type(whole).__name__ == made.tensor_class
    expected = {
        "per row": [1, columns],
        "per tensor": [9, columns],
        f"per group of {made.group_size}": [1, made.group_size],
    }
    assert list(whole.block_size) == expected[made.granularity]
    assert made.bits == 8 * whole.qdata.nbytes / (9 * columns)
    dtype = getattr(whole, "target_dtype", whole.qdata.dtype)
    assert str(dtype) == f"torch.{made.weight_dtype}"
    dynamic = getattr(whole, "act_quant_kwargs", None) or getattr(whole, "activation_quantization", None)
    assert (made.activation is not None) == (dynamic is not None)


@variants
def test_meta_has_the_same_inner_tensors(variant: Any) -> None:
    made = get(variant)
    real = weight(4, 2 * (made.group_size or 48), torch.bfloat16, 2)
    on_meta, on_cpu = quantize(real.to("meta"), made.meta_config), quantize(real, made.config)
    assert type(on_meta) is type(on_cpu)
    described = [{name: (t.shape, t.dtype) for name, t in inner(made_of).items()} for made_of in (on_meta, on_cpu)]
    assert described[0] == described[1]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rowwise_blocks_are_bit_identical(data: st.DataObject) -> None:
    made = data.draw(st.sampled_from(ROWWISE))
    rows = data.draw(st.integers(1, 24))
    columns = data.draw(st.integers(1, 5)) * made.group_size if made.group_size else data.draw(st.integers(2, 70))
    cuts = data.draw(st.lists(st.integers(1, rows - 1), unique=True).map(sorted)) if rows > 1 else []
    values = weight(rows, columns, data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 999)))
    assert pieces_equal_whole(values, made.config, cuts)


def test_rowwise_is_said_of_the_right_ones() -> None:
    assert {variant_id(v) for v in VARIANTS if not get(v).rowwise} == {
        "int8wo-per_tensor",
        "int8dq-per_tensor",
        "float8wo-tensor",
        "intx3wo-g5-hqq_scale_only",
        "intx8wo-hqq_scale_only",
    }


@pytest.mark.parametrize("name", ["int8wo", "int8dq", "float8wo"])
def test_per_tensor_is_not_rowwise(name: str) -> None:
    made = schemes.get(name, settings={"granularity": "per_tensor"})
    assert not pieces_equal_whole(weight(16, 32, torch.float32, 0), made.config, [5])


def test_hqq_is_not_rowwise() -> None:
    """It stops when the worst row has converged; in short rows the result rarely shows it, in long ones often."""
    made = schemes.get("intx8wo", settings={"intx_choose_qparams_algorithm": "hqq_scale_only"})
    long = [torch.randn(4, 65536, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    assert not all(pieces_equal_whole(values, made.config, [1, 2, 3]) for values in long)


@variants
def test_forward_on_the_cpu(variant: Any) -> None:
    made = get(variant)
    columns = 2 * (made.group_size or 32)
    linear = torch.nn.Linear(columns, 8, dtype=torch.float32)
    original = linear.weight.detach().clone()
    linear.weight = quantize(original, made.config)
    inputs = torch.randn(20, columns, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, expected = linear(inputs), torch.nn.functional.linear(inputs, linear.weight.dequantize(), linear.bias)
    error = (got - expected).norm() / expected.norm()
    assert error < (1e-5 if made.activation is None else 0.05)


@pytest.mark.parametrize("row", [row for row in ROWS if 3 in row.ranks], ids=lambda row: row.scheme)
@pytest.mark.parametrize("group_size", [None, 16])
def test_stacked_experts_are_rowwise_too(row: Row, group_size: int | None) -> None:
    if group_size and schemes.find(row.scheme).group_field is None:
        pytest.skip("no groups")
    made = schemes.get(row.scheme, group_size=group_size)
    experts = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert schemes.blocker(tuple(experts.shape), experts.dtype, made) is None
    assert pieces_equal_whole(experts, made.config, [1])


def test_older_torchao_is_ruled_out_where_it_computes_wrongly() -> None:
    assert schemes.get("int8wo", group_size=32).min_torchao == "0.17"
    assert schemes.get("int8dq", settings={"act_mapping_type": "asymmetric"}).layout.requires == ("torchao>=0.17",)
    assert schemes.get("float8wo", group_size=32).min_torchao == "0.13"


@pytest.mark.parametrize("name", [f"intx{bits}wo" for bits in range(1, 9)] + ["int4dq"])
def test_intx_files_are_not_smaller_than_int8(name: str) -> None:
    made = schemes.get(name)
    warned = any("not smaller than int8wo" in note for note in made.notes)
    assert warned == (name != "intx8wo")
    sizes = [
        sum(t.nbytes for t in inner(quantize(weight(64, 256, torch.bfloat16, 0), scheme.config)).values())
        for scheme in (schemes.get(name, group_size=32), schemes.get("int8wo"))
    ]
    assert sizes[0] > sizes[1]


def test_looking_at_a_scheme_changes_nothing() -> None:
    code = """
import torch
from aoconvert.environment import import_torchao
import_torchao()
import torch._inductor.config as inductor
before = torch.get_rng_state(), inductor.save_config_portable(), torch.get_float32_matmul_precision()
from aoconvert import schemes
for name in ("int8wo", "int8dq", "float8wo"):
    assert schemes.get(name).config.set_inductor_config
assert torch.equal(before[0], torch.get_rng_state())
assert before[1:] == (inductor.save_config_portable(), torch.get_float32_matmul_precision())
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
