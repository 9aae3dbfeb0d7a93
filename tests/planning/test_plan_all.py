"""Several plans of one source: each is as it is alone, and what they have in common is read once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.opened import opened_files

from aoconvert import api
from aoconvert.errors import AoconvertError, UsageError
from aoconvert.planning import Plan

Checkpoints = Callable[[str], Path]
Options = dict[str, Any]
Wanted = list[tuple[str | None, Options]]

MODEL: Wanted = [
    ("int8wo", {}),
    ("float8wo", {"dtype": "float16", "skip": ["re:.*fc1"]}),
    ("int9wo", {}),
    ("int8dq_int4", {"group_size": 32, "format": "safetensors", "include_embeddings": True, "untie": True}),
    ("int8wo", {"skip": ["nothing"]}),
    ("int8wo", {}),
]
PIPELINE: Wanted = [
    ("int8wo", {}),
    ("float8wo", {"components": ["text_encoder", "transformer"], "max_shard_size": "40KB"}),
    ("int8dq", {"components": ["text_encoder"], "component_only": True}),
    ("int8wo", {"fuse_qkv": True, "format": "safetensors"}),
]


def apart(source: Path, wanted: Wanted) -> list[Plan | AoconvertError]:
    made: list[Plan | AoconvertError] = []
    for scheme, options in wanted:
        try:
            made.append(api.plan(source, scheme, **options))
        except AoconvertError as error:
            made.append(error)
    return made


def told(made: Plan | AoconvertError) -> Any:
    return made.to_dict() if isinstance(made, Plan) else (type(made), made.problems, made.hint)


@pytest.mark.parametrize(("kind", "wanted"), [("opt", MODEL), ("pipeline", PIPELINE)])
def test_each_plan_is_as_it_is_alone(
    kind: str, wanted: Wanted, checkpoints: Checkpoints, pipeline: Path, tmp_path: Path
) -> None:
    source = pipeline if kind == "pipeline" else checkpoints(kind)
    common = {"device": "cpu", "min_quantized": 0, "output": tmp_path / "out"}
    wanted = [(scheme, {**common, **options}) for scheme, options in wanted]
    together = api.plan_all(source, wanted)  # type: ignore[arg-type]
    assert [told(made) for made in together] == [told(made) for made in apart(source, wanted)]
    assert len({str(told(made)) for made in together}) == len(wanted) - (kind == "opt")
    if kind == "opt":
        assert isinstance(together[2], UsageError)
        assert "nothing" in str(together[4])


@pytest.mark.parametrize("kind", ["opt", "pipeline"])
def test_headers_are_read_once(kind: str, checkpoints: Checkpoints, pipeline: Path, tmp_path: Path) -> None:
    source = pipeline if kind == "pipeline" else checkpoints(kind)
    common = {"device": "cpu", "min_quantized": 0, "output": tmp_path / "out"}
    wanted: Wanted = [(scheme, common) for scheme in ("int8wo", "float8wo", "int8dq")]
    weights = {str(path) for path in source.rglob("*") if path.suffix in (".safetensors", ".bin")}
    with opened_files() as files:
        made = api.plan_all(source, wanted)  # type: ignore[arg-type]
        assert all(isinstance(each, Plan) for each in made)
        assert {name: files[name] for name in weights} == dict.fromkeys(weights, 1)
    if kind == "opt":
        with opened_files() as files:
            apart(source, wanted)
            assert {name: files[name] for name in weights} == dict.fromkeys(weights, 3)
