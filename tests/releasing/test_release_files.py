"""The files of ``manifests/releases``: each is valid, and plans on its published model without any weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jsonschema
import pytest
from helpers.opened import opened_files
from helpers.published import copy_published, read_weights
from helpers.shared import build_once

from aoconvert.cards.hub_names import LICENSES
from aoconvert.options.release import ReleaseOptions
from aoconvert.releasing.guess import guess_seconds
from aoconvert.releasing.release_file import ReleaseFile, Skip, load
from aoconvert.releasing.variants import PlannedVariant, list_variants, plan_variants

MANIFESTS = Path(__file__).parents[2] / "manifests"
FILES = {path.stem: path for path in sorted((MANIFESTS / "releases").glob("*.toml"))}
# a torch file, a pipeline that skips, and one component alone, of two files
DEFAULT = ("opt-125m", "pixart-sigma", "cogvideox-t5-xxl")
# bits of each quantized weight: codes, and what belongs to a group of them
BITS = {"int8": (8, 8.1), "float8": (8, 8.1), "int4wo": (4.1, 5.4), "int8dq_int4": (8.1, 8.2)}

Published = Callable[[str], Path]


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """The folder of a published model without its data, in ``owner/name``; never written to."""

    def build(name: str, folder: Path) -> None:
        copy_published(name, folder.parent.parent)

    return lambda name: build_once(tmp_path_factory, f"published/{name}", partial(build, name))


def plan_file(path: Path, published: Published, place: Path) -> list[PlannedVariant]:
    """Plan a release file's variants as on a machine with disk enough, its models in folders beside it."""
    found = load(path)
    for model in found.all_models:
        (place / model.source).parent.mkdir(parents=True)
        (place / model.source).symlink_to(published(model.source))
    options = ReleaseOptions(owner="org", output_root=place / "out")
    variants = list_variants(Path(shutil.copy(path, place)), found, options)
    plan_variants(variants, options, lambda each: None, elsewhere=True)
    return variants


def test_the_matrix() -> None:
    found = [load(path) for path in FILES.values()]
    assert len(FILES) == 10
    assert sum(len(each.variants) * len(each.all_models) for each in found) >= 30


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_says(name: str) -> None:
    import tomllib

    schema = json.loads((MANIFESTS / "release-file.v1.schema.json").read_text())
    jsonschema.validate(tomllib.loads(FILES[name].read_text()), schema)
    found = load(FILES[name])
    assert found.license in LICENSES
    assert found.gates.require_forward and found.gates.evaluated
    assert all(model.source in read_weights() for model in found.all_models)
    for entry in [*found.defaults.skip, *(entry for variant in found.variants for entry in variant.skip)]:
        assert isinstance(entry, Skip), "a skip has a reason"
        assert len(entry.reason.split()) > 5
        assert all(part.startswith("https://") for part in (entry.source or "").split(", "))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.exhaustive) for name in FILES]
)
def test_a_file_plans_without_weights(name: str, published: Published, tmp_path: Path) -> None:
    found = load(FILES[name])
    variants = plan_file(FILES[name], published, tmp_path)
    assert [each.repo_id for each in variants] == list(dict.fromkeys(each.repo_id for each in variants))
    for each in variants:
        assert each.plan is not None
        [component] = each.plan.components
        totals = component.totals
        weights = read_weights()[each.model.source][component.component.name or "."]
        assert totals.parameters == weights["parameters"]
        least = each.gates.min_quantized
        assert least is not None and least <= totals.quantized_fraction < least + 0.15
        quantized = [tensor for tensor in component.tensors if tensor.action == "quantize"]
        bits = 8 * sum(tensor.bytes_out for tensor in quantized) / sum(tensor.numel for tensor in quantized)
        [(low, high)] = [BITS[key] for key in sorted(BITS, key=len)[::-1] if each.scheme.startswith(key)][:1]
        assert low < bits < high, (each.name, bits)
        assert sum(file.size for file in component.files) < 0.7 * totals.bytes_in
        seconds = guess_seconds(each.plan)
        read = sum(tensor.bytes_in for part in each.plan.streamed for tensor in part.tensors) / 1e9
        assert seconds is None if each.plan.device != "cpu" else 2.6 * read < seconds < 4 + 3.2 * read
        check_skips(found, each)


def check_skips(found: ReleaseFile, each: PlannedVariant) -> None:
    """Every skip of a variant leaves out what its scheme would have quantized."""
    assert each.plan is not None
    skips = [entry.pattern for entry in (*found.defaults.skip, *each.variant.skip) if isinstance(entry, Skip)]
    left = [t for c in each.plan.components for t in c.tensors if t.candidate and "--skip" in (t.reason or "")]
    for pattern in skips:
        assert any(pattern in (tensor.reason or "") for tensor in left), (each.name, pattern)


@pytest.mark.exhaustive
def test_the_fixtures_are_as_large_as_what_is_published(published: Published) -> None:
    """Sizes from the sources that the fixtures' README names."""
    folder = published("meta-llama/Llama-3.1-8B-Instruct")
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
    assert sizes == [4976698672, 4999802720, 4915916176, 1168138808]
    index = published("stabilityai/stable-diffusion-3.5-large") / "transformer"
    [text] = [path.read_text() for path in index.glob("*.index.json")]
    assert json.loads(text)["metadata"] == {"total_size": 16292561536}
    for name in read_weights():
        for path in published(name).rglob("*.safetensors"):
            assert path.stat().st_blocks * 512 < 1 << 20


def test_headers_are_read_once_for_all_variants(published: Published, tmp_path: Path) -> None:
    source = published("THUDM/CogVideoX-5b")  # of which one component is planned
    weights = {str(path.relative_to(source)) for path in (source / "text_encoder").glob("*.safetensors")}
    with opened_files() as files:
        assert len(plan_file(FILES["cogvideox-t5-xxl"], published, tmp_path)) == 3
        opened = {Path(name).name: count for name, count in files.items() if name.endswith(".safetensors")}
    assert opened == {Path(name).name: 1 for name in weights}
