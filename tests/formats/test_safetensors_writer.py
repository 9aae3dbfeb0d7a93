"""Our safetensors against torchao's own writer and reader: same header, same tensors, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao.prototype.safetensors import safetensors_utils
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict

from aoconvert import schemes
from aoconvert.errors import SourceError, UnsafeFileError, WriteError
from aoconvert.formats.content import content_sha256
from aoconvert.formats.hashing import Prefix, count_matching
from aoconvert.formats.safetensors.contents import ATTRIBUTE_CLASSES, TENSOR_CLASSES, read_stored
from aoconvert.formats.safetensors.stored import StoredSafetensors
from aoconvert.formats.safetensors.writer import SafetensorsWriter
from aoconvert.formats.torch_bin.pickle_tree import describe
from aoconvert.schemes.apply import quantize_weight

SCHEMES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("int8wo", {}),
    ("int8dq", {}),
    ("float8dq", {}),
    ("float8dq_row", {}),
    ("int4dq", {}),
    ("mxfp8", {}),
    ("mxfp6_e2m3", {}),
    ("nvfp4", {}),
    ("int4wo", {"layout_device": "cuda"}),
    ("int4wo", {"layout_device": "xpu"}),
)


def model(device: str = "cpu", name: str = "int8wo", **options: Any) -> dict[str, torch.Tensor]:
    """A quantized weight, a bias of an odd number of bytes, a name without a dot, a scalar."""
    generator = torch.Generator().manual_seed(0)
    scheme = schemes.get(name, **options)
    weight = torch.randn(64, 256, generator=generator).to(torch.bfloat16).to(device)
    return {
        "block.weight": quantize_weight(weight, scheme),
        "block.bias": torch.randn(3, generator=generator).to(torch.bfloat16).to(device),
        "table": torch.randn(5, 2, generator=generator).to(device),
        "steps.count": torch.tensor(7).to(device),
    }


def write(path: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, torch.Tensor], **how: Any) -> Any:
    outline = SafetensorsWriter.outline(meta, **how)
    with SafetensorsWriter(path, head=outline.head) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        sealed = writer.seal(how.get("order"), how.get("also"))
    assert sealed.size == outline.size == path.stat().st_size
    return sealed


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Class, attributes, inner tensors and their bits."""
    return describe(one, lambda data: "") == describe(other, lambda data: "") and (
        content_sha256(one) == content_sha256(other)
    )


@pytest.mark.parametrize(("name", "options"), SCHEMES, ids=lambda value: str(value))
def test_torchao_reads_what_it_would_have_written(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    tensors = model("cpu", name, **options)
    write(tmp_path / "a.safetensors", tensors, model("meta", name, **options))
    flat, metadata = flatten_tensor_state_dict(tensors)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == flat.keys()
    assert all(
        torch.equal(found[key].view(-1).view(torch.uint8), flat[key].reshape(-1).view(torch.uint8)) for key in flat
    )
    dotted = {key: value for key, value in metadata.items() if key != "table"}
    dotted["tensor_names"] = json.dumps([key for key in tensors if "." in key])
    made, left = unflatten_tensor_state_dict(found, dotted)
    assert left.keys() == {"table"}
    assert content_sha256(made["block.weight"]) == content_sha256(tensors["block.weight"])


@pytest.mark.parametrize(("name", "options"), SCHEMES, ids=lambda value: str(value))
def test_files_of_torchao_and_ours_are_read_as_what_was_quantized(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    tensors = model("cpu", name, **options)
    write(tmp_path / "ours.safetensors", tensors, model("meta", name, **options))
    flat, metadata = flatten_tensor_state_dict(tensors)
    save_file(flat, tmp_path / "torchao.safetensors", metadata=metadata)
    for file in ("ours", "torchao"):
        with StoredSafetensors(tmp_path / f"{file}.safetensors") as stored:
            assert set(stored.order) == set(tensors)
            assert all(same(stored.read(key), tensors[key]) for key in tensors)


def test_same_bytes_by_rows_and_after_a_stop(tmp_path: Path) -> None:
    tensors, meta = model(), model("meta")
    whole = write(tmp_path / "whole", tensors, meta)
    head = SafetensorsWriter.outline(meta).head
    first, *rest = tensors
    weight: Any = tensors[first]
    writer = SafetensorsWriter(tmp_path / "rows", head=head)
    sink = writer.begin(first, meta[first])
    for start in range(0, 64, 24):
        sink.put(weight.qdata[start : start + 24])
    sink.finish({"scale": weight.scale, "zero_point": weight.zero_point})
    stored = writer.last()
    writer.leave()
    with (tmp_path / "rows").open("ab") as file:
        file.write(b"half a tensor")
    assert SafetensorsWriter.restore([stored], head) == [stored]
    assert SafetensorsWriter.restore([stored], head + b" ") == []
    _, prefix = count_matching(tmp_path / "rows", [(stored.size, stored.sha256)], lambda _: None)
    with SafetensorsWriter(tmp_path / "rows", [stored], prefix, head) as writer:
        for name in rest:
            writer.add(name, tensors[name])
        assert writer.seal().sha256 == whole.sha256
    assert (tmp_path / "rows").read_bytes() == (tmp_path / "whole").read_bytes()


def test_second_names_are_written_twice_and_known(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.arange(6.0), "c.weight": torch.ones(2, dtype=torch.int8)}
    write(tmp_path / "a.safetensors", tensors, tensors, also={"b.weight": "a.weight"})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["b.weight"], tensors["a.weight"])
    with StoredSafetensors(tmp_path / "a.safetensors") as stored:
        assert stored.second_names == {"b.weight": "a.weight"}
        assert stored.order == ["a.weight", "c.weight"]


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (lambda: {"weight": model("meta")["block.weight"]}, "has no dot"),
        (lambda: {"a.weight": quantize_weight(torch.ones(128, 128), schemes.get("float8dq_block"))}, "PerBlock"),
        (lambda: {"a._b_qdata": torch.ones(1), "a.b": model("meta")["block.weight"]}, "would be stored as"),
        (lambda: {"a.b": torch.ones(1, dtype=torch.complex128)}, "no complex128"),
    ],
)
def test_what_cannot_be_stored_is_said_before_anything_is_written(tensors: Any, reason: str) -> None:
    with pytest.raises(WriteError, match=reason):
        SafetensorsWriter.outline(tensors())


def test_what_is_not_in_the_header_is_refused(tmp_path: Path) -> None:
    meta = {"a.x": torch.empty(2, device="meta"), "a.y": torch.empty(2, device="meta")}
    head = SafetensorsWriter.outline(meta).head
    with (
        SafetensorsWriter(tmp_path / "a", head=head) as writer,
        pytest.raises(WriteError, match="not what its header has"),
    ):
        writer.add("a.y", torch.ones(2))
    with SafetensorsWriter(tmp_path / "a", head=head) as writer:
        writer.add("a.x", torch.ones(2))
        with pytest.raises(WriteError, match="more tensors than were written"):
            writer.seal()
    assert not (tmp_path / "a").exists()


def test_the_names_that_are_allowed_are_those_of_torchao() -> None:
    kinds = {name: getattr(kind, "__module__", "") for name, kind in safetensors_utils.ALLOWED_CLASSES.items()}
    assert set(TENSOR_CLASSES) == set(safetensors_utils.ALLOWED_TENSORS_SUBCLASSES)
    assert TENSOR_CLASSES.keys() | ATTRIBUTE_CLASSES == kinds.keys()
    assert all(TENSOR_CLASSES[name] == f"{kinds[name]}.{name}" for name in TENSOR_CLASSES)


def hostile(entry: Any, **changes: Any) -> dict[str, str]:
    """Metadata whose entry of the weight is changed."""
    values = json.loads(entry)
    values.update({key: value for key, value in changes.items() if key != "data"})
    values["_data"].update(changes.get("data", {}))
    return {"block.weight": json.dumps(values), "tensor_names": json.dumps(["block.weight"])}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_type": "os.system"}, "torchao's safetensors do not have"),
        ({"_tensor_data_names": ["qdata", "scale", "__class__"]}, "parts that are not names"),
        ({"_tensor_data_names": ["qdata", "scale", "zero_point", "more"]}, "is not in this file"),
        ({"_tensor_data_names": []}, "lists no parts"),
        ({"data": {"dtype": {"_type": "torch.dtype", "_data": "hub"}}}, "torchao's safetensors do not have"),
        ({"data": {"x": {"_type": "Popen", "_data": {}}}}, "torchao's safetensors do not have"),
        ({"data": {"x": {"_type": "MappingType", "_data": "__class__"}}}, "is made of"),
        ({"data": {"__init__": 1}}, "attributes that are not names"),
        ({"data": {"shape": [1 << 40, 1 << 40]}}, "shape is not one"),
        ({"data": {"x": [[[[[[[1]]]]]]]}}, "nested too deeply"),
        ({"data": {"x": list(range(1000))}}, "list of 1000 values"),
        ({"data": {"qdata": 1}}, "an attribute and a part"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_hostile_header_is_refused_before_torchao_sees_it(tmp_path: Path, changes: Any, reason: str) -> None:
    flat, metadata = flatten_tensor_state_dict({"block.weight": model()["block.weight"]})
    save_file(flat, tmp_path / "a.safetensors", metadata=hostile(metadata["block.weight"], **changes))
    with pytest.raises(UnsafeFileError, match=reason):
        read_stored(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "metadata",
    [
        {"tensor_names": "[1]"},
        {"tensor_names": "{"},
        {"tensor_names": '["block.weight"]'},
        {"tensor_names": '["block.weight", "block.weight"]', "block.weight": '{"_type": "Tensor"}'},
        {"tensor_names": "[" * 100_000},
        {"tensor_names": '["block.weight"]', "block.weight": "3"},
    ],
    ids=lambda value: str(value)[:40],
)
def test_metadata_that_are_none_are_refused(tmp_path: Path, metadata: dict[str, str]) -> None:
    save_file({"block.weight": torch.ones(2)}, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(UnsafeFileError):
        read_stored(tmp_path / "a.safetensors")


def test_parts_that_torchao_makes_no_tensor_of_are_an_answer(tmp_path: Path) -> None:
    flat, metadata = flatten_tensor_state_dict({"block.weight": model()["block.weight"]})
    changed = hostile(metadata["block.weight"], data={"no_such_field": 1})
    save_file(flat, tmp_path / "a.safetensors", metadata=changed)
    with StoredSafetensors(tmp_path / "a.safetensors") as stored, pytest.raises(SourceError, match="no_such_field"):
        stored.read("block.weight")


def test_a_file_of_plain_tensors_is_like_any_other(tmp_path: Path) -> None:
    tensors = {"a.x": torch.ones(2), "b": torch.ones(1)}
    write(tmp_path / "a.safetensors", tensors, tensors)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert list(read_stored(tmp_path / "a.safetensors").tensors) == ["a.x", "b"]
    assert Prefix().size == 0
