"""Stacks of experts: what ``settle`` says is what a reloaded model does."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.converted import MODELS, build
from torchao.core.config import config_to_dict
from torchao.quantization import FqnToConfig

from aoconvert import schemes
from aoconvert.models import Skeleton, build_skeleton, identify
from aoconvert.models.base import ModelPart, describe_tensors, from_json, to_json
from aoconvert.models.experts import IMPLEMENTATIONS, Settled, settle
from aoconvert.schemes.apply import quantize_weight
from aoconvert.sources import resolve

T: Any = tiny.transformers
MIXTURES = [
    "mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v3", "phimoe", "gpt-oss", "llama4", "qwen4", "qwen3-vl-moe",
    "ernie-vl-moe",
]  # fmt: skip
# what the projections' layout and the way they are multiplied leave
FEWER = {("gpt-oss", "int8wo"): None, ("gpt-oss", "float8wo"): "eager"}
FEWER |= {("llama4", name): None for name in ("int8wo", "float8wo")}


def expected(name: str, scheme: str) -> str | None:
    """The implementation that runs; ``None``: no one does."""
    return FEWER.get((name, scheme), "eager" if scheme == "int8wo" else "grouped_mm")


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Skeleton]]:
    """Checkpoint and skeleton. Do not write to it."""

    @cache
    def get(name: str) -> tuple[Path, Skeleton]:
        folder = tmp_path_factory.mktemp("mixtures") / name
        build(name, folder)
        component = identify(resolve(str(folder))).component("")
        assert component is not None
        return folder, build_skeleton(component, torch.bfloat16)

    return get


def settled(skeleton: Skeleton, scheme: str) -> Settled:
    chosen = schemes.get(scheme)
    wanted = {spec.name: chosen for spec in skeleton if spec.kind == "experts"}
    return settle(skeleton, wanted, quantize_weight)


def forward(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result = model(input_ids=torch.arange(1, 25).reshape(1, 24), use_cache=False).logits
    return torch.as_tensor(result)


def calm(model: Any) -> dict[str, torch.Tensor]:
    """Weights of a usual size, so that what the model gives says something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif "norm" in name:
                parameter.fill_(1.0)
    tied = model.all_tied_weights_keys
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}


def write(source: Path, output: Path, state: Mapping[str, torch.Tensor], scheme: str, **config: Any) -> None:
    output.mkdir()
    torch.save(dict(state), output / "pytorch_model.bin")
    values = json.loads((source / "config.json").read_text()) | config
    quant = FqnToConfig({r"re:.*\.experts\.(gate_up_proj|down_proj)": schemes.get(scheme).config})
    values["quantization_config"] = {"quant_method": "torchao", "quant_type": {"default": config_to_dict(quant)}}
    (output / "config.json").write_text(json.dumps(values))


CASES = [(name, scheme) for name in MIXTURES for scheme in ("int8wo", "float8wo")]
QUICK = {("mixtral", "int8wo"), ("qwen3-vl-moe", "int8wo"), ("mixtral", "float8wo"), ("gpt-oss", "float8wo")}
QUICK |= {("gpt-oss", "int8wo"), ("llama4", "float8wo")}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.exhaustive) for case in CASES],
)
def test_what_settles_is_what_a_reloaded_model_does(
    name: str, scheme: str, mixtures: Callable[[str], tuple[Path, Skeleton]], tmp_path: Path
) -> None:
    source, skeleton = mixtures(name)
    outcome = settled(skeleton, scheme)
    works = expected(name, scheme)
    experts = {spec.name for spec in skeleton if spec.kind == "experts"}
    assert experts
    assert outcome.implementation == (None if works == "grouped_mm" else works)
    assert set(outcome.refused) == (set() if works else experts)

    cls = getattr(T, MODELS[name][0])
    model = cls.from_pretrained(source).eval()
    state = calm(model)
    chosen = schemes.get(scheme)
    quantized = {key: quantize_weight(value, chosen) if key in experts else value for key, value in state.items()}
    if works is None:
        for at, implementation in enumerate(IMPLEMENTATIONS):  # nor does any other way
            write(source, tmp_path / str(at), quantized, scheme, experts_implementation=implementation)
            try:
                loaded = cls.from_pretrained(tmp_path / str(at))
            except ValueError as error:
                assert "does not support setting experts" in str(error)
                continue
            with pytest.raises((NotImplementedError, AssertionError)):
                forward(loaded)
        return
    named = {"experts_implementation": outcome.implementation} if outcome.implementation else {}
    write(source, tmp_path / "out", quantized, scheme, **named)
    loaded = cls.from_pretrained(tmp_path / "out").eval()
    kept = loaded.state_dict()
    assert {type(kept[key]).__name__ for key in experts} == {chosen.entry.tensor_class.name}
    assert set(loaded.get_experts_implementation().values()) == {works}
    model.load_state_dict({k: v.dequantize() if k in experts else v for k, v in quantized.items()}, strict=False)
    model.set_experts_implementation(works)
    got, wanted = forward(loaded), forward(model)
    if scheme == "float8wo":
        assert torch.equal(got, wanted)
    assert (got - wanted).norm() < 0.1 * wanted.norm()


def test_another_way_would_not_do(mixtures: Callable[[str], tuple[Path, Skeleton]], tmp_path: Path) -> None:
    """Without the key in config.json an int8 stack loads, and dies when it is used."""
    source, skeleton = mixtures("mixtral")
    chosen = schemes.get("int8wo")
    experts = {spec.name for spec in skeleton if spec.kind == "experts"}
    state = calm(T.MixtralForCausalLM.from_pretrained(source))
    write(source, tmp_path / "out", {k: quantize_weight(v, chosen) if k in experts else v for k, v in state.items()},
          "int8wo")  # fmt: skip
    loaded = T.MixtralForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(NotImplementedError):
        forward(loaded)


def test_a_width_that_the_trial_may_not_cut(mixtures: Callable[[str], tuple[Path, Skeleton]]) -> None:
    """Groups longer than the trial's usual width; the model itself is left as it was."""
    source, _ = mixtures("mixtral")
    config = json.loads((source / "config.json").read_text()) | {"intermediate_size": 384, "hidden_size": 768}
    component = ModelPart("", "", "transformers", "MixtralForCausalLM", config)
    skeleton = build_skeleton(component, torch.float16)
    chosen = schemes.get("int8wo", group_size=384)
    wanted = {spec.name: chosen for spec in skeleton if spec.kind == "experts"}
    assert settle(skeleton, wanted, quantize_weight) == Settled("eager", {})
    assert skeleton.model is not None
    assert all(tensor.is_meta for tensor in skeleton.model.parameters())
    assert skeleton.model.config._experts_implementation == "grouped_mm"
    assert {spec.name: spec.shape for spec in skeleton} == {
        name: tuple(tensor.shape) for name, tensor in skeleton.model.state_dict().items()
    }


def test_one_layer_alone(mixtures: Callable[[str], tuple[Path, Skeleton]]) -> None:
    """What is not wanted stays as it is, beside what is."""
    _, skeleton = mixtures("mixtral")
    down = next(spec.name for spec in skeleton if spec.name.endswith("experts.down_proj"))
    assert settle(skeleton, {down: schemes.get("int8wo")}, quantize_weight) == Settled("eager", {})
    assert settle(skeleton, {}, quantize_weight) == Settled(None, {})


def test_a_mixture_of_diffusers_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class multiplies the stack in its own way."""
    monkeypatch.setenv("AOCONVERT_CACHE_DIR", str(tmp_path))
    config = {"num_layers": 4, "attention_head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    config |= {"joint_attention_dim": 32, "moe_enabled": True, "num_experts": 4, "moe_intermediate_dim": 16}
    config |= {"in_channels": 16, "out_channels": 16, "axes_dims_rope": [4, 6, 6], "dense_moe_strategy": "all_moe"}
    component = ModelPart("transformer", "", "diffusers", "NucleusMoEImageTransformer2DModel", config)
    for remembered in (False, True):
        skeleton = build_skeleton(component, torch.bfloat16)
        assert (skeleton.model is None) == remembered
        outcome = settled(skeleton, "float8wo")
        assert outcome.refused
        assert outcome.implementation is None
        assert {spec.hint for spec in skeleton if spec.module.endswith(".gate")} == {"router of a mixture of experts"}


@pytest.mark.parametrize(
    ("name", "routers"),
    [
        ("phimoe", {"mlp.router": "router of a mixture of experts"}),
        ("llama4", {"feed_forward.router": "router of a mixture of experts"}),
        ("qwen2-moe", {"mlp.shared_expert_gate": "gate of a mixture's shared expert"}),
        ("mixtral", {}),  # its router is a parameter, not a linear layer
    ],
)
def test_routers(name: str, routers: Mapping[str, str], mixtures: Callable[[str], tuple[Path, Skeleton]]) -> None:
    _, skeleton = mixtures(name)
    found = {spec.module.split(".", 3)[-1]: spec.hint for spec in skeleton if spec.hint not in (None, "output head")}
    assert found == routers
    assert all(spec.kind == "linear" for spec in skeleton if spec.hint)


def test_what_is_remembered_of_a_tensor(mixtures: Callable[[str], tuple[Path, Skeleton]]) -> None:
    tensors = mixtures("phimoe")[1].tensors
    assert {spec.kind for spec in tensors} == {"linear", "embedding", "experts", "other"}
    assert all(spec.single_row for spec in tensors if spec.kind == "experts")
    assert from_json(json.loads(json.dumps(to_json(tensors)))) == tensors


def decorated() -> list[tuple[str, str]]:
    """Every class of the installed transformers whose experts are dispatched."""
    root = Path(T.__file__).parent / "models"
    pattern = re.compile(r"^@use_experts_implementation(?:\([^)]*\))?\nclass (\w+)", re.M)
    return [
        (path.parent.name, name)
        for path in sorted(root.glob("*/modeling_*.py"))
        for name in pattern.findall(path.read_text())
    ]


def built_by_default(folder: str, name: str) -> Any:
    """The module on ``meta`` from one of its model's configs as they are by default, or ``None``."""
    configs = vars(importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")).values()
    cls = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)
    for config in configs:
        if isinstance(config, type) and issubclass(config, T.PreTrainedConfig):
            try:
                with torch.device("meta"):
                    return cls(config())
            except Exception:  # a config of another part of the model fails in its own way
                continue
    return None


@pytest.mark.exhaustive
def test_every_mixture_of_transformers_at_its_real_width() -> None:
    """All but those that lie the other way round take int8 one by one, and float8 in any way."""
    tried = 0
    for folder, name in decorated():
        module = built_by_default(folder, name)
        if module is None:
            continue
        holder = torch.nn.Module()
        holder.experts = module
        tensors = describe_tensors(holder, tied={}, keep_fp32=frozenset(), precise=frozenset())
        skeleton = Skeleton(ModelPart("", "", "transformers", name, {}), holder, tensors)
        int8, float8 = settled(skeleton, "int8wo"), settled(skeleton, "float8wo")
        if module.is_transposed:
            assert int8.refused, name
        else:
            assert (int8, float8) == (Settled("eager", {}), Settled(None, {})), name
        tried += 1
    assert tried > 50
