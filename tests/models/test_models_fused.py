"""Fused projections: what is made of what, and that the load code gives the same model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from helpers import tiny

from aoconvert import schemes
from aoconvert.errors import SourceError
from aoconvert.models import Skeleton, build_skeleton
from aoconvert.models.base import ModelPart, Rows, SourceTensor
from aoconvert.models.conversions import MergeRecipe, build, resolve_conversions
from aoconvert.models.fused import FUSED, conversions
from aoconvert.schemes.apply import flatten, quantize_weight

D: Any = tiny.diffusers


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def _cogvideox() -> Any:
    return D.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=16,
    )  # fmt: skip


def _flux_inputs() -> dict[str, Any]:
    ids = {"img_ids": torch.zeros(20, 3), "txt_ids": torch.zeros(16, 3)}
    scalars = {"timestep": torch.tensor([0.5]).bfloat16(), "guidance": torch.tensor([3.0]).bfloat16()}
    return {
        "hidden_states": noise(1, 20, 16),
        "encoder_hidden_states": noise(1, 16, 32),
        "pooled_projections": noise(1, 32),
        **ids,
        **scalars,
    }


_STEP = {"timestep": torch.tensor([5])}
# model, inputs, the fused layers of a block, and whether a fused matrix product has the same last bit here
MODELS: Mapping[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]], set[str], bool]] = {
    "cogvideox": (
        _cogvideox,
        lambda: {**_STEP, "hidden_states": noise(1, 2, 4, 8, 8), "encoder_hidden_states": noise(1, 16, 32)},
        {"to_qkv"},
        True,
    ),
    "flux": (tiny.flux_transformer, _flux_inputs, {"to_qkv", "to_added_qkv"}, True),
    "sd3": (
        tiny.sd3_transformer,
        lambda: {
            **_STEP,
            "hidden_states": noise(1, 4, 16, 16),
            "encoder_hidden_states": noise(1, 18, 64),
            "pooled_projections": noise(1, 64),
        },
        {"to_qkv", "to_added_qkv"},
        True,
    ),
    "pixart": (
        tiny.pixart_transformer,
        lambda: {
            **_STEP,
            "hidden_states": noise(1, 4, 16, 16),
            "encoder_hidden_states": noise(1, 18, 32),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        {"to_qkv", "to_kv"},
        False,
    ),
    "wan": (
        tiny.wan_transformer,
        lambda: {**_STEP, "hidden_states": noise(1, 16, 2, 8, 8), "encoder_hidden_states": noise(1, 18, 32)},
        {"to_qkv", "to_kv"},
        False,
    ),
    "vae": (tiny.image_vae, lambda: {"sample": noise(1, 3, 32, 32)}, {"to_qkv"}, True),
}


class Fused:
    """A model with random weights, its fused skeleton, and how that is made."""

    def __init__(self, name: str) -> None:
        self._make, self._inputs, self.layers, self.same_bits = MODELS[name]
        model = self._make()
        self.state = {
            key: noise(*value.shape) * 0.1 if value.is_floating_point() else value
            for key, value in model.state_dict().items()
        }
        self.config, self.cls = dict(model.config), type(model)
        component = ModelPart("transformer", "", "diffusers", self.cls.__name__, self.config)
        self.skeleton: Skeleton = build_skeleton(component, torch.bfloat16, fuse_qkv=True)
        found = {
            key: SourceTensor("file", key, value.dtype, tuple(value.shape), value.nbytes)
            for key, value in self.state.items()
        }
        self.recipes: list[MergeRecipe] = resolve_conversions(self.skeleton, conversions(self.skeleton), found)
        self.made = {key: value for recipe in self.recipes for key, value in self.build(recipe, None).items()}

    def build(self, recipe: MergeRecipe, rows: Rows | None) -> dict[str, torch.Tensor]:
        def load(source: SourceTensor, part: Rows | None) -> torch.Tensor:
            return self.state[source.name] if part is None else self.state[source.name][part[0] : part[1]]

        return build(recipe, self.skeleton.model, rows, load)

    def written(self, scheme: str | None) -> dict[str, torch.Tensor]:
        """The file's tensors."""
        plain = {spec.name: self.made.get(spec.name, self.state.get(spec.name)) for spec in self.skeleton}
        linear = {spec.name for spec in self.skeleton if spec.kind == "linear"}
        return {key: self.quantized(key in linear, value, scheme) for key, value in plain.items() if value is not None}

    @staticmethod
    def quantized(candidate: bool, value: torch.Tensor, scheme: str | None) -> torch.Tensor:
        return quantize_weight(value, schemes.get(scheme)) if candidate and scheme else value

    def unfused(self, scheme: str | None) -> Any:
        """The model as it would be without fusing."""
        with init_empty_weights():
            model = self.cls.from_config(self.config)
        linear = {f"{key}.weight" for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        state = {key: self.quantized(key in linear, value, scheme) for key, value in self.state.items()}
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval()

    def loaded(self, scheme: str | None) -> Any:
        """By the code of a card."""
        with init_empty_weights():
            model = self.cls.from_config(self.config)
        model.fuse_qkv_projections()
        for module in model.modules():
            for fused, parts in FUSED.items():
                if hasattr(module, fused) and hasattr(module, parts[0]):
                    for part in parts:
                        delattr(module, part)
        model.load_state_dict(self.written(scheme), strict=True, assign=True)
        return model.eval()

    def forward(self, model: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.as_tensor(model(**self._inputs()).sample)


@pytest.fixture(scope="module")
def fused() -> Callable[[str], Fused]:
    return cache(Fused)


NAMES = [name if name in ("flux", "pixart") else pytest.param(name, marks=pytest.mark.exhaustive) for name in MODELS]


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_there_or_made(name: str, fused: Callable[[str], Fused]) -> None:
    case = fused(name)
    names = {spec.name for spec in case.skeleton}
    sources = {source.name for recipe in case.recipes for source in recipe}
    assert {layer.rpartition(".")[2] for layer in case.skeleton.fused} == case.layers
    assert names - set(case.state) == set(case.made)
    assert set(case.state) - names == sources
    assert {recipe.along for recipe in case.recipes} == {"concatenated"}
    kinds = {spec.name: spec.kind for spec in case.skeleton}
    assert {kinds[key] for key in case.made if key.endswith("weight")} == {"linear"}
    for recipe in case.recipes:
        [(key, shape)] = recipe.targets.items()
        whole = torch.cat([case.state[source.name] for source in recipe])
        assert torch.equal(case.made[key], whole)
        cut = shape[0] // 2 + 1
        rows = [case.build(recipe, part)[key] for part in ((0, 1), (1, cut), (cut, shape[0]))]
        assert torch.equal(torch.cat(rows), whole)


@pytest.mark.parametrize("scheme", [None, "int8wo", pytest.param("float8wo", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", NAMES)
def test_the_load_code_gives_the_same_model(name: str, scheme: str | None, fused: Callable[[str], Fused]) -> None:
    case = fused(name)
    model, other = case.loaded(scheme), case.unfused(scheme)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    one, two = model.state_dict(), other.state_dict()
    for recipe in case.recipes:
        [key] = recipe.targets
        parts = [two[source.name] for source in recipe]
        if scheme is None or not key.endswith("weight"):
            continue
        for inner in flatten(one[key])[0]:  # a row has its own scale: fused before or after is the same
            assert torch.equal(getattr(one[key], inner), torch.cat([getattr(part, inner) for part in parts])), key
    got, wanted = case.forward(model), case.forward(other)
    if not case.same_bits:
        assert (got - wanted).norm() < 0.02 * wanted.norm()
        other = case.unfused(None)
        other.fuse_qkv_projections()  # what diffusers itself makes of the same weights
        model, wanted = case.loaded(None), case.forward(other)
        got = case.forward(model)
    assert torch.equal(got, wanted)


def _unet() -> Any:
    return D.UNet2DConditionModel(
        sample_size=16, layers_per_block=1, block_out_channels=(16, 32), in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_unet, "not supported for models having added KV"),
        (D.AutoencoderTiny, "has no"),
        (lambda: D.AutoencoderKL(mid_block_add_attention=False, norm_num_groups=8, block_out_channels=(16,)), "has no"),
    ],
)
def test_models_that_cannot_be_fused(make: Callable[[], Any], why: str) -> None:
    model = make()
    component = ModelPart("transformer", "", "diffusers", type(model).__name__, dict(model.config))
    with pytest.raises(SourceError, match=why) as caught:
        build_skeleton(component, torch.bfloat16, fuse_qkv=True)
    assert caught.value.hint == "leave out --fuse-qkv"


def test_models_of_transformers_cannot_be_fused() -> None:
    component = ModelPart("", "", "transformers", "LlamaForCausalLM", {"model_type": "llama"})
    with pytest.raises(SourceError, match="only diffusers models"):
        build_skeleton(component, torch.bfloat16, fuse_qkv=True)
