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
from helpers.bits import assert_same, same
from scheme_table import ROWS, VARIANTS, Row, attributes, get, inner, parameters, quantize, variant_id, weight_shape
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import quantize_

from aoconvert import schemes
from aoconvert.errors import PlanError, UsageError
from aoconvert.schemes import int4
from aoconvert.schemes.apply import quantize_weight

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
variants = pytest.mark.parametrize("variant", parameters())


def weight(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of very different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows)[:, None]
    if rows > 2:
        made[seed % rows] = 0
    return made.to(dtype)


def pieces_equal_whole(values: torch.Tensor, made: schemes.Scheme, cuts: list[int]) -> bool:
    """Whether quantizing blocks of rows and concatenating their inner tensors gives the whole."""
    whole = quantize(values, made.config)
    edges = [0, *cuts, values.shape[0]]
    blocks = [quantize(values[i:j].clone(), made.config) for i, j in itertools.pairwise(edges)]
    if any(attributes(block) != attributes(whole) or inner(block).keys() != inner(whole).keys() for block in blocks):
        return False
    for name, tensor in inner(whole).items():
        parts = [inner(block)[name] for block in blocks]
        if not tensor.shape or not same(torch.cat(parts), tensor):
            return False
    return True


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.scheme)
def test_defaults(row: Row) -> None:
    made = schemes.get(row.scheme)
    assert type(made.config).__name__ == row.config
    assert (made.name, made.entry.tensor_class.name, made.entry.weight_dtype) == (
        row.scheme,
        row.tensor_class,
        row.weight_dtype,
    )
    assert (made.format.activation, made.format.granularity) == (row.activation, row.granularity)
    assert (made.ranks, made.entry.fails_on_single_row, made.format.bits) == (row.ranks, row.needs_rows, row.bits)
    assert round(made.format.bytes_per_parameter, 2) == row.bytes
    assert made.min_torchao == row.min_torchao
    assert (made.layout.device, made.layout.min_capability) == (row.device, row.capability)
    assert made.entry.embeddings == row.embeddings
    assert made.entry.summary == schemes.find(row.scheme).summary
    if made.entry.layout_device is None:
        assert made.layout.requires == (f"torchao>={row.min_torchao}",)
        assert made.config.version in (1, 2)


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_only_int4_depends_on_the_device(device: str) -> None:
    made = schemes.get("int4wo", layout_device=device)
    assert made.layout.device == device
    assert made.entry.layout_device == device
    assert (made.entry.unconfirmed is None) == (device == "cpu")
    assert any("unconfirmed" in note for note in made.notes) == (device != "cpu")
    for name in ("int8wo", "float8dq", "nvfp4wo"):
        assert schemes.get(name, layout_device=device) == schemes.get(name)


def test_unknown_layout_devices_are_refused() -> None:
    with pytest.raises(UsageError, match="tpu"):
        schemes.get("int8wo", layout_device="tpu")


def test_int4_for_mslk_says_that_it_is_missing() -> None:
    with pytest.raises(PlanError, match="mslk"):
        schemes.get("int4wo", layout_device="plain")


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_int4_is_what_its_layout_makes(device: str) -> None:
    made = schemes.get("int4wo", group_size=32, layout_device=device)
    values = weight(32, 128, torch.bfloat16, 4)
    got = quantize_weight(values, made)
    assert type(got).__name__ == made.entry.tensor_class.name
    expected = int4.quantize(values, group_size=32, device=device, algorithm="tinygemm")
    assert inner(got).keys() == inner(expected).keys()
    assert all(same(tensor, inner(expected)[name]) for name, tensor in inner(got).items())
    on_meta = quantize_weight(values.to("meta"), made)
    assert {n: (t.shape, t.dtype) for n, t in inner(on_meta).items()} == {
        n: (t.shape, t.dtype) for n, t in inner(got).items()
    }


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
    rows, columns = weight_shape(made, 9, 6 if made.group_size else 30)
    whole = quantize(weight(rows, columns, torch.bfloat16, 1), made.config)
    assert type(whole).__name__ == made.entry.tensor_class.name
    expected = {
        "per row": [1, columns],
        "per tensor": [rows, columns],
        "per block of 128x128": [128, 128],
    }
    block = whole.block_size if isinstance(whole.block_size, list | tuple) else [1, whole.block_size]
    assert list(block) == expected.get(made.format.granularity, [1, made.group_size])
    if made.group_size:
        assert made.format.granularity.startswith(f"per group of {made.group_size}")
    assert ("and per tensor" in made.format.granularity) == (getattr(whole, "per_tensor_scale", None) is not None)
    assert made.format.bits == 8 * whole.qdata.nbytes / (rows * columns)
    dynamic = getattr(whole, "act_quant_kwargs", None) or getattr(whole, "activation_quantization", None)
    assert (made.format.activation is not None) == (dynamic is not None)
    if whole.qdata.dtype != torch.uint8:
        assert str(getattr(whole, "target_dtype", whole.qdata.dtype)) == f"torch.{made.entry.weight_dtype}"


@variants
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_is_what_torchaos_handler_makes(variant: Any, dtype: torch.dtype) -> None:
    made = get(variant)
    rows, columns = weight_shape(made, 20, 3 if made.group_size else 48)
    values = weight(rows, columns, dtype, 5)
    if (schemes.blocker((rows, columns), dtype, made)) is not None:
        assert str(dtype).removeprefix("torch.") not in made.entry.dtypes
        return
    got, expected = quantize_weight(values, made), quantize(values, made.config)
    assert_same(got, expected)
    on_meta = quantize_weight(values.to("meta"), made)
    assert type(on_meta) is type(got)
    described = [{name: (t.shape, t.dtype) for name, t in inner(tensor).items()} for tensor in (on_meta, got)]
    assert described[0] == described[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["float8dq", "float8dq_row", "float8dq_block", "nvfp4"])
@pytest.mark.parametrize("shape", [(256, 384), (2, 128, 256)], ids=str)
def test_a_capable_gpu_writes_the_same(name: str, shape: tuple[int, ...]) -> None:
    """The whole handler, no question answered for it; its bytes, and ours made on the CPU and on the GPU."""
    made = schemes.get(name)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (made.layout.min_capability or (0, 0)):
        pytest.skip(f"needs a CUDA device of capability {made.layout.min_capability}")
    if schemes.blocker(shape, torch.bfloat16, made) is not None:
        pytest.skip("the scheme does not take this shape")
    values = torch.randn(shape, generator=torch.Generator().manual_seed(6)).bfloat16()
    linear = torch.nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(values.cuda(), requires_grad=False)
    quantize_(linear, made.config)
    assert_same(quantize_weight(values.cuda(), made), linear.weight.detach())
    assert_same(quantize_weight(values, made), linear.weight.detach().cpu())


EMBEDDINGS = [row.scheme for row in ROWS if row.scheme not in ("intx2wo", "intx3wo", "intx5wo", "intx6wo", "intx7wo")]


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_are_said_of_the_right_ones(name: str) -> None:
    made = schemes.get(name)
    embedding = torch.nn.Embedding(128, 256, dtype=torch.bfloat16)
    quantized = quantize_weight(embedding.weight.detach(), made)
    embedding.weight = torch.nn.Parameter(quantized, requires_grad=False)
    indices = torch.tensor([[0, 127], [5, 5]])
    if not made.entry.embeddings:
        with pytest.raises(NotImplementedError):
            embedding(indices)
        return
    assert torch.equal(embedding(indices), quantized.dequantize()[indices])


def test_what_shares_a_scale_is_said() -> None:
    """How weights can be cut is held against torchao in the engine's test_engine_blocks."""
    shared = {variant_id(variant) for variant in VARIANTS if get(variant).rows.shared_scale}
    assert shared == {
        *("int8wo-per_tensor", "int8dq-per_tensor", "float8wo-tensor", "float8dq"),
        *("nvfp4", "nvfp4wo", "nvfp4-true"),
    }
    uncut = {variant_id(variant) for variant in VARIANTS if get(variant).rows.tile is None}
    assert uncut == {variant_id(variant) for variant in VARIANTS if "hqq_scale_only" in variant[2].values()}
    assert [schemes.get("int4wo", layout_device=device).rows.tile for device in ("cpu", "cuda", "xpu")] == [64, 8, 1]
    assert schemes.get("int4wo", settings={"int4_choose_qparams_algorithm": "hqq"}).rows.tile is None


def test_hqq_is_not_rowwise() -> None:
    """It stops when the worst row has converged; in short rows the result rarely shows it, in long ones often."""
    made = schemes.get("intx8wo", settings={"intx_choose_qparams_algorithm": "hqq_scale_only"})
    assert not made.rows.by_tiles
    long = [torch.randn(4, 65536, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    assert not all(pieces_equal_whole(values, made, [1, 2, 3]) for values in long)


@variants
def test_forward_on_the_cpu(variant: Any) -> None:
    made = get(variant)
    if made.layout.device == "cuda":
        pytest.skip("needs a GPU")
    dtype = torch.float32 if "float32" in made.entry.dtypes else torch.bfloat16
    rows, columns = weight_shape(made, 8, 2 if made.group_size else 32)
    linear = torch.nn.Linear(columns, rows, dtype=dtype)
    linear.weight = torch.nn.Parameter(quantize_weight(linear.weight.detach(), made), requires_grad=False)
    inputs = torch.randn(20, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        got, expected = linear(inputs), torch.nn.functional.linear(inputs, linear.weight.dequantize(), linear.bias)
    error = (got - expected).norm() / expected.norm()
    assert error < (1e-5 if made.format.activation is None else 0.05 if "int8" in made.format.activation else 0.1)


@pytest.mark.parametrize("row", [row for row in ROWS if 3 in row.ranks], ids=lambda row: row.scheme)
@pytest.mark.parametrize("group_size", [None, 16])
def test_stacked_experts_are_quantized_one_by_one(row: Row, group_size: int | None) -> None:
    if group_size and schemes.find(row.scheme).group_field is None:
        pytest.skip("no groups")
    made = schemes.get(row.scheme, group_size=group_size)
    experts = torch.randn(3, 128, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert schemes.blocker(tuple(experts.shape), experts.dtype, made) is None
    assert pieces_equal_whole(experts, made, [1])  # along the experts, also where rows depend on each other


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


def test_a_look_at_a_scheme_starts_no_threads() -> None:
    """A process that forks afterwards would wait for them for ever."""
    code = (
        "import os, torch\n"
        "from aoconvert import schemes\n"
        "from aoconvert.schemes.apply import quantize_with\n"
        "from torchao.quantization import Int8WeightOnlyConfig\n"
        "quantize_with(torch.ones(2, 64), Int8WeightOnlyConfig())\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "for entry in schemes.catalogue():\n"
        "    if entry.name in ('float8dq_block', 'int4wo'):  # large blocks; asks the op how it packs here\n"
        "        continue\n"
        "    schemes.get(entry.name)\n"
        "    assert len(os.listdir('/proc/self/task')) == before, entry.name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "4"})
