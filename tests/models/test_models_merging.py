"""Tensors that transformers builds from others: every architecture's conversion, bit by bit as ``from_pretrained``."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.bits import same
from helpers.converted import MODELS, build
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter

import aoconvert
from aoconvert.checkpoint import manifest as manifests
from aoconvert.engine.read import ComponentReading
from aoconvert.models.conversions import BLOCK_BYTES
from aoconvert.options import QuantizeOptions
from aoconvert.planning import Plan
from aoconvert.planning.build import build_plan
from aoconvert.sources import resolve

T: Any = tiny.transformers


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints of ``MODELS`` in many small files, as transformers saves them. Do not write to them."""

    @cache
    def get(name: str) -> Path:
        folder = tmp_path_factory.mktemp("merging") / name
        build(name, folder)
        return folder

    return get


def plan_of(folder: Path, output: Path, dtype: str = "bfloat16") -> Plan:
    return build_plan(
        resolve(str(folder)),
        QuantizeOptions(output=output, scheme="int8wo", min_quantized=0.0, device="cpu", dtype=dtype),
    )


def reference(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Mapping[str, torch.Tensor]:
    class_name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(T, class_name).from_pretrained(folder, dtype=dtype).state_dict()


@contextmanager
def opened(plan: Plan, scratch: Path) -> Iterator[ComponentReading]:
    with ComponentReading(plan.components[0], plan, scratch) as reading:
        yield reading


def assert_as_loaded(plan: Plan, scratch: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """Every tensor whole, and what is made also row by row into one buffer; nothing is written meanwhile."""
    [component] = plan.components
    tensors = {tensor.name: tensor for tensor in component.tensors}
    assert set(component.order) | {t.name for t in component.tensors if t.action == "tied"} == set(expected)
    buffer = torch.empty(1 << 20, dtype=torch.uint8)
    scratch.mkdir()
    with opened(plan, scratch) as reading:
        for name in component.order:
            tensor = tensors[name]
            assert str(expected[name].dtype) == f"torch.{tensor.dtype}", name
            whole = reading.read(tensor, None, None)
            assert whole.is_contiguous()
            assert torch.equal(whole.to(expected[name].dtype), expected[name]), name
            for row in range(tensor.shape[0] if tensor.sources else 0):
                part = reading.read(tensor, (row, row + 1), buffer)
                assert torch.equal(part, whole[row : row + 1]), (name, row)
                assert part.data_ptr() == buffer.data_ptr()
        assert not list(scratch.iterdir())
        files = reading.digests()
    assert files == {path: sha256(plan.source.local(path)) for path in component.weights.files}  # type: ignore[union-attr]


def sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_what_from_pretrained_gives(name: str, built: Callable[[str], Path], tmp_path: Path) -> None:
    plan = plan_of(built(name), tmp_path / "out")
    [component] = plan.components
    assert component.copied is None
    assert component.weights is not None and len(component.weights.files) > 1
    assert Counter(component.recipes[t.name].along for t in component.tensors if t.sources) == MODELS[name][2]
    assert_as_loaded(plan, tmp_path / "scratch", reference(built(name)))


@pytest.mark.parametrize("name", ["qwen2-moe", "ernie-vl-moe"])
def test_sources_in_float32_are_cast_as_transformers_casts_them(
    name: str, built: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    class_name = MODELS[name][0]
    model = getattr(T, class_name).from_pretrained(built(name), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(source)
    plan = plan_of(source, tmp_path / "out")
    made = [tensor for tensor in plan.components[0].tensors if tensor.sources]
    assert {tensor.source_dtype for tensor in made} == {"float32"}
    sizes = {name: tensor.nbytes for name, tensor in load_file(source / "model.safetensors").items()}
    parts = {origin for tensor in made for _, origin in tensor.sources}
    assert sum(tensor.bytes_in for tensor in made) == sum(sizes[part] for part in parts)
    assert_as_loaded(plan, tmp_path / "scratch", reference(source))


def test_what_a_class_makes_in_float32_stays_so(built: Callable[[str], Path], tmp_path: Path) -> None:
    """No list names these: the class gives the parameter its dtype."""
    tensors = plan_of(built("olmo-hybrid"), tmp_path / "out").components[0].tensors
    kept = {tensor.name for tensor in tensors if tensor.dtype == "float32"}
    expected = reference(built("olmo-hybrid"))
    assert kept == {name for name, tensor in expected.items() if tensor.dtype == torch.float32}
    assert any(name.endswith("A_log") for name in kept)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_rows(data: st.DataObject, row_reading: tuple[Plan, ComponentReading, Mapping[str, torch.Tensor]]) -> None:
    plan, reading, expected = row_reading
    tensor = data.draw(st.sampled_from([item for item in plan.components[0].tensors if item.sources]))
    start = data.draw(st.integers(0, tensor.shape[0]))
    stop = data.draw(st.integers(start, tensor.shape[0]))
    into = data.draw(
        st.sampled_from([None, torch.empty(64, dtype=torch.uint8), torch.empty(1 << 16, dtype=torch.uint8)])
    )
    assert torch.equal(reading.read(tensor, (start, stop), into), expected[tensor.name][start:stop])


@pytest.fixture(scope="module", params=["qwen4", "ernie-vl-moe", "qwen3-vl-moe"])
def row_reading(
    request: pytest.FixtureRequest, built: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Plan, ComponentReading, Mapping[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("rows")
    plan = plan_of(built(request.param), folder / "out")
    with opened(plan, folder) as reading:
        yield plan, reading, reference(built(request.param))


def test_a_merged_tensor_comes_where_its_first_source_lies(built: Callable[[str], Path], tmp_path: Path) -> None:
    [component] = plan_of(built("qwen2-moe"), tmp_path / "out").components
    files = [file.path for file in component.files]
    assert files == ["pytorch_model.bin"]
    places = {}
    position = 0
    assert component.weights is not None
    for path in component.weights.files:
        for name in load_file(built("qwen2-moe") / path):
            places[name] = position
            position += 1
    tensors = {tensor.name: tensor for tensor in component.tensors}
    shards = {path: rank for rank, path in enumerate(component.weights.files)}
    first = []
    for name in component.order:
        tensor = tensors[name]
        origins = [tensor.origin] if tensor.origin else tensor.sources
        first.append(min(shards[file] for file, _ in origins))
    assert first == sorted(first)


def test_the_plan_counts_no_copy(built: Callable[[str], Path], tmp_path: Path) -> None:
    plan = plan_of(built("mixtral"), tmp_path / "out")
    [component] = plan.components
    assert not [line for line in plan.warnings if "copy" in line]
    assert plan.needs.disk_bytes == sum(file.size for file in component.files) + sum(item.size for item in plan.copied)
    made = [tensor for tensor in component.tensors if tensor.sources]
    assert all(tensor.origin is None and tensor.bytes_in == tensor.numel * 2 for tensor in made)
    # a stack is made expert by expert, from the expert's matrices
    experts = {tensor.working_bytes - tensor.bytes_in // tensor.shape[0] for tensor in made}
    assert experts == {4 * BLOCK_BYTES}
    assert component.carried == ()
    plan = plan_of(built("nomic-bert"), tmp_path / "out")
    [component] = plan.components
    made = [tensor for tensor in component.tensors if tensor.sources]
    assert {tensor.working_bytes / tensor.bytes_in for tensor in made} == {2.0 * 3}


class CheckedMerge(MergeModulelist):
    """An operation that looks at values, which are not there while the plan is made."""

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
        if not all(tensor.isfinite().all() for tensors in input_dict.values() for tensor in tensors):
            raise ValueError("not finite")
        return super().convert(input_dict, source_patterns, target_patterns, **kwargs)


class NamedMerge(MergeModulelist):
    """Stacks, but who knows that."""


@contextmanager
def registered(operation: type[MergeModulelist]) -> Iterator[None]:
    """Mixtral's experts go through ``operation``, by transformers' public registry."""
    before = get_checkpoint_conversion_mapping("mixtral")
    changed = [
        WeightConverter(
            entry._original_source_patterns,
            entry._original_target_patterns,
            [operation(dim=0) if isinstance(item, MergeModulelist) else item for item in entry.operations],
        )
        if isinstance(entry, WeightConverter)
        else entry
        for entry in get_checkpoint_conversion_mapping("mixtral")
    ]
    register_checkpoint_conversion_mapping("mixtral", changed, overwrite=True)
    try:
        yield
    finally:
        register_checkpoint_conversion_mapping("mixtral", before, overwrite=True)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir() if path.suffix == ".bin"}


def test_the_copy_is_made_and_told_where_an_operation_cannot_be_followed(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoints("mixtral")
    aoconvert.quantize(source, "int8wo", output=tmp_path / "usual", device="cpu", min_quantized=0)
    with registered(CheckedMerge):
        plan = plan_of(source, tmp_path / "out")
        [component] = plan.components
        made = [tensor for tensor in component.tensors if tensor.name.endswith("_proj") and len(tensor.shape) == 3]
        assert len(made) == 4
        assert all(tensor.origin is None and not tensor.sources for tensor in made)
        [warning] = [line for line in plan.warnings if "copy" in line]
        assert "transformers holds a second copy of its merged tensors during the run" in warning
        assert "model.layers.0.mlp.experts.gate_up_proj" in warning
        written = [*component.files, *plan.copied]
        assert plan.needs.disk_bytes == sum(item.size for item in written) + sum(tensor.bytes_in for tensor in made)
        aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0)
    written = [torch.load(tmp_path / name / "pytorch_model.bin", weights_only=True) for name in ("out", "usual")]
    assert written[0].keys() == written[1].keys()
    assert all(same(written[0][tensor.name], written[1][tensor.name]) for tensor in made)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "usual").iterdir()
    }


def test_an_operation_that_is_not_known_is_given_everything(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoints("mixtral")
    expected = reference(source)
    with registered(NamedMerge):
        plan = plan_of(source, tmp_path / "out")
        [component] = plan.components
        assert component.copied is None
        assert {component.recipes[t.name].along for t in component.tensors if t.sources} == {None}
        assert_as_loaded(plan, tmp_path / "scratch", expected)


def test_an_expert_that_is_not_there(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers refuses the checkpoint; so does the plan, and names the tensor that cannot be made."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints("mixtral"), source)
    tensors = load_file(source / "model.safetensors")
    gone = next(name for name in tensors if ".experts.2." in name and "layers.1" in name)
    del tensors[gone]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    says = r"transformers cannot open it: model\.layers\.1\.mlp\.experts\.gate_up_proj: Sizes of tensors must match"
    with pytest.raises(aoconvert.AoconvertError, match=says):
        aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_merged_tensor_beside_its_parts(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers takes the parts; the other is named as left out."""
    source, name = tmp_path / "source", "model.layers.1.mlp.experts.gate_up_proj"
    shutil.copytree(checkpoints("mixtral"), source)
    tensors = load_file(source / "model.safetensors")
    made = reference(source)[name]
    save_file({**tensors, name: made + 1}, source / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(reference(source)[name], made)
    aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0)
    aoconvert.quantize(checkpoints("mixtral"), "int8wo", output=tmp_path / "usual", device="cpu", min_quantized=0)
    one, other = (torch.load(tmp_path / place / "pytorch_model.bin", weights_only=True) for place in ("out", "usual"))
    assert one.keys() == other.keys()
    assert all(same(tensor, other[key]) for key, tensor in one.items())
    [left] = manifests.load(tmp_path / "out").components[0].dropped
    assert (left.name, "maps to the same tensor" in left.reason) == (name, True)


def test_a_tensor_that_changed_after_the_plan(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoints("mixtral"), source)
    plan = plan_of(source, tmp_path / "out")
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if ".experts.1." in name)
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    [component] = plan.components
    touched = next(t for t in component.tensors if name in {origin for _, origin in t.sources})
    with (
        opened(plan, tmp_path) as reading,
        pytest.raises(aoconvert.AoconvertError, match="changed since the plan was made"),
    ):
        reading.read(touched, None, None)
