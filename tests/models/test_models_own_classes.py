"""Parts whose classes are a pipeline's own, or code beside their weights: they arrive, and can be chosen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import own_parts, tiny
from safetensors.torch import load_file
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import aoconvert
from aoconvert.models import identify
from aoconvert.sources import resolve


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            built[name] = tmp_path_factory.mktemp("own") / name
            own_parts.build(name, built[name])
        return built[name]

    return get


def opened(folder: Path, **kwargs: Any) -> Any:
    """The pipeline; parts that model_index.json has as null are passed as None, or diffusers misses them."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    return tiny.diffusers.DiffusionPipeline.from_pretrained(folder, **absent, **kwargs)


DEFAULT = ("stable-diffusion", "ltx2")
NAMES = [pytest.param(n, marks=[] if n in DEFAULT else pytest.mark.exhaustive) for n in own_parts.PIPELINES]


@pytest.mark.parametrize("name", NAMES)
def test_every_part_arrives(name: str, pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    source, out = pipelines(name), tmp_path / "out"
    written = aoconvert.quantize(source, "int8wo", output=out, device="cpu", min_quantized=0.0).manifest
    [chosen] = written.components
    assert chosen.name in ("transformer", "unet")
    own = {part.name for part in (*written.components, *written.unquantized)} & set(own_parts.PIPELINES[name][1])
    assert own == set(own_parts.PIPELINES[name][1])
    assert not written.left_behind
    for weights in source.glob("*/*.safetensors"):
        part = weights.parent.name
        if part != chosen.name:
            before, after = load_file(weights), torch.load(next((out / part).glob("*.bin")), weights_only=True)
            assert before.keys() == after.keys()
            assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    if name == "deepfloyd":  # its safety checker does not open with transformers 5, in the source either
        with pytest.raises(AttributeError, match="all_tied_weights_keys"):
            opened(source)
        return
    pipe, original = opened(out, torch_dtype=torch.bfloat16), opened(source, torch_dtype=torch.bfloat16)
    assert {key: type(part) for key, part in pipe.components.items()} == {
        key: type(part) for key, part in original.components.items()
    }
    if name == "controlnets":
        before, after = (model.controlnet.state_dict() for model in (original, pipe))
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_a_list_of_models(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    """Each is in a folder of its own; together they cannot be quantized."""
    source = pipelines("controlnets")
    parts = [part.name for part in identify(resolve(str(source))).parts]
    assert [name for name in parts if name.startswith("controlnet")] == ["controlnet", "controlnet_1"]
    with pytest.raises(aoconvert.SourceError, match="MultiControlNetModel is a list of models") as error:
        aoconvert.plan(source, "int8wo", output=tmp_path / "out", device="cpu", components=["controlnet"])
    assert error.value.hint == "quantize one of them: --subfolder controlnet"
    assert identify(resolve(str(source)), "controlnet_1").class_name == "ControlNetModel"


def quantized(model: Any) -> dict[str, torch.Tensor]:
    quantize_(model, Int8WeightOnlyConfig(version=2))
    return dict(model.state_dict())


def check(model: Any, expected: dict[str, torch.Tensor], least: int) -> None:
    count = 0
    for name, tensor in model.state_dict().items():
        if type(tensor).__name__ == "Int8Tensor":
            count += 1
            assert torch.equal(tensor.qdata, expected[name].qdata), name
            assert torch.equal(tensor.scale, expected[name].scale), name
        elif type(expected[name]).__name__ != "Int8Tensor":
            assert torch.equal(tensor, expected[name]), name
    assert count >= least


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ltx2", "connectors"),
        ("audioldm2", "unet"),
        pytest.param("stable-diffusion", "safety_checker", marks=pytest.mark.exhaustive),
    ],
)
def test_it_can_be_chosen(name: str, part: str, pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    source, out = pipelines(name), tmp_path / "out"
    options = {"device": "cpu", "min_quantized": 0.0, "components": [part]}
    written = aoconvert.quantize(source, "int8wo", output=out, **options).manifest
    assert written.components[0].module == json.loads((source / "model_index.json").read_text())[part][0]
    expected = quantized(getattr(opened(source, torch_dtype=torch.bfloat16), part))
    check(getattr(opened(out, torch_dtype=torch.bfloat16), part), expected, 5)


def test_it_can_be_a_model_of_its_own(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    """Alone, nothing but its class says where that is."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    source = pipelines("ltx2") / "connectors"
    written = aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu").manifest
    assert written.components[0].module == "ltx2"
    expected = quantized(LTX2TextConnectors.from_pretrained(source, torch_dtype=torch.bfloat16))
    check(LTX2TextConnectors.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16), expected, 5)
    assert "from diffusers.pipelines.ltx2 import LTX2TextConnectors" in aoconvert.card(tmp_path / "out").text


CODE = """
from diffusers import UNet2DConditionModel

class MyUNet(UNet2DConditionModel):
    pass
"""


@pytest.fixture
def custom(pipelines: Callable[[str], Path], tmp_path: Path) -> Path:
    source = tmp_path / "custom"
    shutil.copytree(pipelines("stable-diffusion"), source)
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps({**index, "unet": ["my_unet", "MyUNet"]}))
    config = json.loads((source / "unet/config.json").read_text())
    (source / "unet/config.json").write_text(json.dumps({**config, "_class_name": "MyUNet"}))
    (source / "unet/my_unet.py").write_text(CODE)
    return source


def test_code_beside_the_weights(custom: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(aoconvert.SourceError, match="finds no 'MyUNet' in 'my_unet'") as caught:
        aoconvert.plan(custom, "int8wo", output=out, device="cpu", min_quantized=0.0)
    assert "--trust-remote-code" in str(caught.value.hint)
    options = {"output": out, "device": "cpu", "min_quantized": 0.0, "trust_remote_code": True}
    aoconvert.quantize(custom, "int8wo", **options)
    assert (out / "unet/my_unet.py").read_text() == CODE
    pipe = tiny.diffusers.DiffusionPipeline.from_pretrained(out, trust_remote_code=True, torch_dtype=torch.bfloat16)
    assert type(pipe.unet).__name__ == "MyUNet"


PIPELINE = """
from diffusers import StableDiffusionPipeline

class MyPipeline(StableDiffusionPipeline):
    pass
"""


def test_a_pipeline_of_its_own_code(pipelines: Callable[[str], Path], tmp_path: Path) -> None:
    source, out = tmp_path / "custom", tmp_path / "out"
    shutil.copytree(pipelines("stable-diffusion"), source)
    index(source, _class_name=["my_pipeline", "MyPipeline"])
    (source / "my_pipeline.py").write_text(PIPELINE)
    options = {"output": out, "device": "cpu", "min_quantized": 0.0, "trust_remote_code": True}
    written = aoconvert.quantize(source, "int8wo", **options).manifest
    assert written.components[0].load.kwargs["trust_remote_code"] is True
    pipe = tiny.diffusers.DiffusionPipeline.from_pretrained(out, trust_remote_code=True, torch_dtype=torch.bfloat16)
    assert type(pipe).__name__ == "MyPipeline"
    assert "trust_remote_code=True" in aoconvert.card(out).text


def test_code_that_is_not_trusted_is_named(custom: Path, tmp_path: Path) -> None:
    """Another part is chosen; the denoiser's weights arrive, its code does not."""
    made = aoconvert.plan(custom, "int8wo", output=tmp_path / "out", device="cpu", components=["text_encoder"])
    assert [part.component.name for part in made.unquantized] == ["safety_checker", "unet", "vae"]
    [left] = made.left_behind
    assert (left.path, left.reason) == ("unet/my_unet.py", "code; --trust-remote-code copies it")


def index(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**values, **changes}))


@pytest.fixture
def broken(pipelines: Callable[[str], Path], tmp_path: Path) -> Path:
    shutil.copytree(pipelines("stable-diffusion"), tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (
            "safety_checker/model.safetensors",
            "safety_checker: no weights in source/safety_checker, and StableDiffusion",
        ),
        (
            "vae/diffusion_pytorch_model.safetensors",
            "vae: no weights in source/vae, and AutoencoderKL cannot be opened",
        ),
        ("vae/config.json", "vae: no config.json in source/vae, and AutoencoderKL cannot be opened without"),
    ],
)
def test_a_part_that_lacks_something(gone: str, said: str, broken: Path, tmp_path: Path) -> None:
    """diffusers refuses it, too."""
    (broken / gone).unlink()
    with pytest.raises(OSError):
        opened(broken)
    with pytest.raises(aoconvert.PlanError) as caught:
        aoconvert.quantize(broken, "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0.0)
    [problem] = caught.value.problems
    assert problem.startswith(said)
    assert "[null, null]" in problem
    made = aoconvert.plan(broken, "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0.0)
    assert problem in made.warnings


def test_a_part_whose_folder_is_gone(broken: Path, tmp_path: Path) -> None:
    shutil.rmtree(broken / "safety_checker")
    with pytest.raises(aoconvert.SourceError, match="names the part 'safety_checker', which does not exist"):
        aoconvert.quantize(broken, "int8wo", output=tmp_path / "out", device="cpu")


def test_values_that_are_not_parts(broken: Path, tmp_path: Path) -> None:
    """A part that is null, settings that are plain or lists, a folder that nobody names."""
    index(
        broken, safety_checker=[None, None], requires_safety_checker=False, layers=[9, 18], spec=["diffusers", "X", {}]
    )
    made = aoconvert.plan(broken, "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0.0)
    assert [part.component.name for part in made.unquantized] == ["text_encoder", "vae"]
    assert {(item.path, item.reason) for item in made.left_behind} == {
        (f"safety_checker/{name}", "safety_checker/ holds weights that do not belong to this model")
        for name in ("config.json", "model.safetensors")
    }


def test_a_part_beside_model_index(broken: Path, tmp_path: Path) -> None:
    """What has no folder of its own diffusers looks for in the pipeline's."""
    for path in (broken / "scheduler").iterdir():
        path.rename(broken / path.name)
    (broken / "scheduler").rmdir()
    aoconvert.quantize(broken, "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0.0)
    assert (tmp_path / "out/scheduler_config.json").read_bytes() == (broken / "scheduler_config.json").read_bytes()
    opened(tmp_path / "out", torch_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("names", "classes", "expected"),
    [
        (("transformer", "vae"), ("WanTransformer3DModel", "AutoencoderKLWan"), ("transformer",)),
        (("prior", "text_encoder"), ("PriorTransformer", "CLIPTextModel"), ("prior",)),
        (("decoder", "vqgan"), ("StableCascadeUNet", "PaellaVQModel"), ("decoder",)),
        (("transformer", "unconditional_transformer"), ("A", "A"), ("transformer", "unconditional_transformer")),
        (("vae",), ("AutoencoderKL",), ()),
    ],
)
def test_the_denoiser(names: tuple[str, ...], classes: tuple[str, ...], expected: tuple[str, ...]) -> None:
    from aoconvert.models import ModelLayout, ModelPart

    components = tuple(ModelPart(name, name, "diffusers", cls, {}) for name, cls in zip(names, classes, strict=True))
    layout = ModelLayout("pipeline", "", "SomePipeline", components)
    assert tuple(component.name for component in layout.default_components) == expected


def test_every_class_with_weights_is_found() -> None:
    """All classes of all modules of diffusers' pipelines, by the name that save_pretrained gives their module."""
    import contextlib
    import inspect
    import pkgutil

    from diffusers import pipelines
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    from aoconvert.models import ModelPart
    from aoconvert.models.own_classes import is_model, locate, own_class

    bases = (tiny.diffusers.ModelMixin, tiny.transformers.PreTrainedModel)
    found = set()
    bases = (tiny.diffusers.ModelMixin, tiny.transformers.PreTrainedModel)
    for info in pkgutil.iter_modules(pipelines.__path__):
        module = getattr(pipelines, info.name, None) if info.ispkg else None
        for name in dir(module):
            cls = None
            with contextlib.suppress(Exception):  # a lazy module that is not there
                cls = getattr(module, name)
            if (
                not inspect.isclass(cls)
                or not issubclass(cls, bases)
                or cls.__module__.split(".")[1:2] != ["pipelines"]
            ):
                continue
            library = "diffusers" if issubclass(cls, bases[0]) else "transformers"
            assert own_class(ModelPart("part", "part", library, name, {}, info.name), info.name) is cls
            assert is_model(info.name, name)
            alone = locate(ModelPart("", "", library, name, {}))
            assert alone.module is None or own_class(alone, alone.module) is cls
            found.add(info.name)
    assert found >= {
        "stable_diffusion",
        "deepfloyd_if",
        "audioldm2",
        "stable_audio",
        "ltx",
        "ltx2",
        "kandinsky",
        "flux",
    }
    assert not found & LOADABLE_CLASSES.keys()
