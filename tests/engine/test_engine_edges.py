"""Shapes and values at the edge, in checkpoints of a real class: bit-equal to torchao, left alone with a reason, or
refused in one line."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.bits import assert_same, bits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from table.cells import ROWS
from table.reference import expected

import aoconvert
from aoconvert import schemes
from aoconvert.checkpoint.manifest import ComponentEntry
from aoconvert.errors import PlanError, QuantizeError
from aoconvert.schemes.tensors import dequantize

LAYER = "encoder.layer.0."
QUERY, KEY, VALUE = (f"{LAYER}attention.self.{name}.weight" for name in ("query", "key", "value"))
MIXED, UP, DOWN = (f"{LAYER}{name}.dense.weight" for name in ("attention.output", "intermediate", "output"))

# one for each class, config and packing; the others differ from one of them in the number of bits
FEW = [row for row in ROWS if not row.startswith(("intx", "uint", "int8dq_int", "mxfp6_e3", "mxfp8_"))]
FEW += ["intx4wo", "uint4wo"]
# every scheme of those with one of the two, in turn
BASES = {(row, ("float16", "float32")[number % 2]) for number, row in enumerate(FEW)}
ROWWISE_FLOAT8 = ("float8wo", "float8wo_e5m2", "float8dq_row")


def each_scheme(few: list[str] = FEW) -> Iterator[Any]:
    for row in ROWS:
        yield pytest.param(row, marks=() if row in few else pytest.mark.exhaustive)


def options(row: str) -> tuple[str, dict[str, Any]]:
    name, _, device = row.partition("/")
    return name, ({"group_size": 32, "layout_device": device} if device else {})


def scheme_of(row: str) -> schemes.Scheme:
    name, chosen = options(row)
    return schemes.get(name, **chosen)


def bert(folder: Path, hidden: int, inner: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A BERT of one layer, whose weights have these two sizes and no others."""
    config = tiny.transformers.BertConfig(
        vocab_size=11,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hidden * 100 + inner)
        tiny.transformers.BertModel(config).to(dtype).save_pretrained(folder)
    return folder


def changed(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The checkpoint with other values."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class Made:
    component: ComponentEntry
    written: dict[str, Any]
    folder: Path

    def entry(self, name: str) -> Any:
        return next(tensor for tensor in self.component.tensors if tensor.name == name)


def convert(source: Path, row: str, output: Path, **more: Any) -> Made:
    name, chosen = options(row)
    result = aoconvert.quantize(
        source, name, output=output, device="cpu", min_quantized=0, overwrite=True, **chosen, **more
    )
    [component] = result.manifest.components
    [file] = [file.path for file in component.files if file.path.endswith(".bin")]
    return Made(component, torch.load(output / file, weights_only=True), output)


def reference(source: Path, row: str, made: Made, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """What torchao makes of the tensors that were quantized; of the others, the source in the dtype."""
    opener = getattr(tiny.transformers, made.component.class_name)
    model = opener.from_pretrained(source, dtype=dtype)
    quantized = {tensor.name for tensor in made.component.tensors if tensor.action == "quantize"}
    return expected(model, scheme_of(row), quantized)[0]


def assert_as_torchao(source: Path, row: str, made: Made, dtype: torch.dtype = torch.bfloat16) -> None:
    """Every tensor is what torchao makes of it, or was left alone with a reason."""
    theirs = reference(source, row, made, dtype)
    assert set(made.written) == set(theirs)
    for tensor in made.component.tensors:
        assert_same(made.written[tensor.name], theirs[tensor.name], tensor.name)
        assert (tensor.reason is None) == (tensor.action == "quantize"), tensor.name


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Path]:
    """A checkpoint that every scheme can take: 128 and 256 wide. Do not write to it."""
    folder = tmp_path_factory.mktemp("edges")

    def get(dtype: torch.dtype) -> Path:
        place = folder / str(dtype)
        return place if place.exists() else bert(place, 128, 256, dtype)

    return get


# --- shapes


@settings(max_examples=6, deadline=None)
@example("int8wo", 1, 1)
@example("float8wo", 1, 13)
@example("intx4wo", 13, 1)
@example("uint8wo", 1, 7)
@example("nvfp4wo", 1, 1)
@example("int8dq", 7, 13)
@given(st.sampled_from(ROWS), st.sampled_from([1, 2, 3, 7, 13, 31]), st.sampled_from([1, 5, 11, 97]))
def test_shapes_that_divide_by_nothing(
    tmp_path_factory: pytest.TempPathFactory, row: str, hidden: int, inner: int
) -> None:
    """Also weights of one row, of one column, and of one value."""
    root = tmp_path_factory.mktemp("prime")
    source = bert(root / "source", hidden, inner)
    try:
        made = convert(source, row, root / "out")
    except PlanError as error:
        [problem] = error.problems
        assert "nothing is left to quantize (" in problem
        assert "\n" not in problem
        assert list(root.iterdir()) == [source]
        return
    assert_as_torchao(source, row, made)
    opened = tiny.transformers.BertModel.from_pretrained(made.folder).state_dict()
    for tensor in made.component.tensors:
        assert_same(opened[tensor.name], made.written[tensor.name], tensor.name)


def test_an_empty_weight_is_left_alone(tmp_path: Path) -> None:
    source = bert(tmp_path / "source", 16, 0)
    made = convert(source, "int8wo", tmp_path / "out")
    assert_as_torchao(source, "int8wo", made)
    for name, shape in ((UP, (0, 16)), (DOWN, (16, 0))):
        assert made.entry(name).shape == shape
        assert made.entry(name).reason == "it is empty"
    assert made.entry(QUERY).action == "quantize"
    opened = tiny.transformers.BertModel.from_pretrained(made.folder)
    assert opened.get_parameter(UP).shape == (0, 16)


def test_a_scalar_parameter_is_left_alone(tmp_path: Path) -> None:
    """CLIP's temperature."""
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tiny.transformers.CLIPConfig(
        text_config={**part, "vocab_size": 8, "max_position_embeddings": 4},
        vision_config={**part, "image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    source = tmp_path / "source"
    tiny.transformers.CLIPModel(config).bfloat16().save_pretrained(source)
    made = convert(source, "int8wo", tmp_path / "out")
    assert_as_torchao(source, "int8wo", made)
    scale = made.entry("logit_scale")
    assert (scale.shape, scale.action) == ((), "keep")
    assert scale.reason is not None
    opened = tiny.transformers.CLIPModel.from_pretrained(made.folder)
    assert_same(opened.logit_scale.data, made.written["logit_scale"], "logit_scale")


# --- values


def edges(tensors: dict[str, torch.Tensor]) -> None:
    """Zeros, rows of zeros, denormals, and zeros with a sign."""
    tensors[QUERY].zero_()
    tensors[KEY][3:6] = 0
    # 0 to 127 times 2**-133, the smallest step: all denormal
    tensors[VALUE] = torch.arange(128 * 128, dtype=torch.int16).remainder(128).reshape(128, 128).view(torch.bfloat16)
    tensors[MIXED][::2, ::2] = -0.0
    tensors[UP][1] = -0.0
    tensors[DOWN][0] = torch.finfo(torch.bfloat16).tiny


@pytest.mark.parametrize("row", each_scheme())
def test_zeros_and_denormals(row: str, square: Callable[[torch.dtype], Path], tmp_path: Path) -> None:
    """As torchao makes them; what it leaves without a scale is repaired, loads as zeros, and is counted."""
    source = changed(square(torch.bfloat16), tmp_path / "source", edges)
    before = load_file(source / "model.safetensors")
    made = convert(source, row, tmp_path / "out")
    theirs = reference(source, row, made)
    opened = tiny.transformers.BertModel.from_pretrained(made.folder).state_dict()
    for tensor in made.component.tensors:
        name, ours = tensor.name, made.written[tensor.name]
        assert_same(opened[name], ours, name)
        if not tensor.repaired_rows:
            assert_same(ours, theirs[name], name)
        if tensor.action != "quantize":
            assert tensor.reason is not None
            continue
        values = dequantize(ours)
        assert values.isfinite().all(), name
        zeros = (before[name] == 0).all(1)
        assert torch.equal(values[zeros], torch.zeros_like(values[zeros])), name
        if row in ROWWISE_FLOAT8:
            lost = ~dequantize(theirs[name]).isfinite().all(1)
            assert tensor.repaired_rows == int(lost.sum()), name
            assert lost[zeros].all()
            for part in ("qdata", "scale"):
                assert torch.equal(bits(getattr(ours, part)[~lost]), bits(getattr(theirs[name], part)[~lost])), name
    if row in ROWWISE_FLOAT8:
        counts = {name: made.entry(name).repaired_rows for name in (QUERY, KEY, MIXED, UP)}
        assert counts == {QUERY: 128, KEY: 3, MIXED: 0, UP: 1}


@pytest.mark.parametrize("row", each_scheme())
def test_the_largest_finite_values(row: str, square: Callable[[torch.dtype], Path], tmp_path: Path) -> None:
    """As torchao makes them; or what it makes is not finite, and that is said."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][0, 0], tensors[UP][1, 1] = torch.finfo(torch.bfloat16).max, -torch.finfo(torch.bfloat16).max
        tensors[UP][2, 2], tensors[UP][2, 3] = torch.finfo(torch.bfloat16).max, -torch.finfo(torch.bfloat16).max

    source = changed(square(torch.bfloat16), tmp_path / "source", change)
    try:
        made = convert(source, row, tmp_path / "out")
    except QuantizeError as error:
        name, _ = options(row)
        assert error.message == f"{UP}: {name} turns it into NaN or infinity"
        assert error.hint == f"--skip {UP}" + ("" if name == "int8wo" else ", or choose int8wo")
        weight = load_file(source / "model.safetensors")[UP]
        linear = torch.nn.Sequential(torch.nn.Linear(128, 256, bias=False))
        linear[0].weight = torch.nn.Parameter(weight, requires_grad=False)
        [theirs] = expected(linear, scheme_of(row), ["0.weight"])[0].values()
        assert not dequantize(theirs).isfinite().all()
        assert list(tmp_path.iterdir()) == [source]
        return
    assert_as_torchao(source, row, made)
    assert made.entry(UP).action == "quantize"
    assert dequantize(made.written[UP]).isfinite().all()


@pytest.mark.parametrize("name", [QUERY, DOWN])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_not_finite_is_refused(
    name: str,
    value: str,
    square: Callable[[torch.dtype], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from aoconvert.cli.main import main

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][5, 7] = float(value)

    source = changed(square(torch.bfloat16), tmp_path / "source", change)
    for scheme in ("int8wo", "nvfp4wo"):
        with pytest.raises(SystemExit) as ended:
            main(["quantize", str(source), "--scheme", scheme, "-o", str(tmp_path / "out"), "--device", "cpu"])
        assert ended.value.code == 1
        said = capsys.readouterr().err
        assert f"error: {name} holds NaN or infinity\n" in said
        assert said.count("error: ") == 1
        assert "Traceback" not in said
        assert list(tmp_path.iterdir()) == [source]


def test_a_cast_that_overflows_is_refused(square: Callable[[torch.dtype], Path], tmp_path: Path) -> None:
    """A norm of 1e30 is infinity in float16."""
    name = f"{LAYER}output.LayerNorm.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3] = 1e30

    source = changed(square(torch.bfloat16), tmp_path / "source", change)
    with pytest.raises(QuantizeError, match=f"{name} overflows float16"):
        convert(source, "int8wo", tmp_path / "out", dtype="float16")


# --- base dtypes


@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        pytest.param(*case, marks=() if case in BASES else pytest.mark.exhaustive)
        for case in itertools.product(ROWS, ("float16", "float32"))
    ],
)
def test_other_base_dtypes(row: str, dtype: str, square: Callable[[torch.dtype], Path], tmp_path: Path) -> None:
    base = getattr(torch, dtype)
    source = square(base)
    bfloat16_only = row == "int4wo/cuda" or (row == "int4wo/xpu" and dtype == "float32")
    takes = dtype in scheme_of(row).entry.dtypes and not bfloat16_only
    try:
        made = convert(source, row, tmp_path / "out", dtype=dtype)
    except PlanError as error:
        [problem] = error.problems
        assert dtype in problem
        assert not takes
        return
    assert takes
    assert_as_torchao(source, row, made, base)
    assert made.entry(UP).action == "quantize"
    assert made.entry(UP).dtype == dtype
