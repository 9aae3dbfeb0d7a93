"""The rule for layers that see one row per sample, checked against what really passes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny

from aoconvert.models.base import single_row_modules


@contextmanager
def rows_seen(model: torch.nn.Module) -> Iterator[dict[str, int]]:
    """Most rows of input that each linear layer sees."""
    seen: dict[str, int] = {}
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def body(module: Any, inputs: Any) -> None:
            rows = inputs[0].numel() // inputs[0].shape[-1]
            seen[name] = max(seen.get(name, 0), rows)

        return body

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(hook(name)))
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["cogvideox", "flux", "pixart", "sd3", "wan"])
def test_pipelines(name: str, checkpoints: Callable[[str], Path]) -> None:
    family = tiny.FAMILIES[name]
    pipe = tiny.open_result(family, checkpoints(name))
    # no classifier-free guidance: a batch of one
    plain = type(pipe).__call__

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, guidance_scale=1.0, **kwargs)

    unguided = type("Unguided", (type(pipe),), {"__call__": step})
    pipe.__class__ = unguided
    with torch.no_grad(), rows_seen(pipe.transformer) as seen:
        family.step(pipe)
    assert len(seen) > 10
    assert {layer for layer, rows in seen.items() if rows == 1} == single_row_modules(pipe.transformer) & set(seen)


def test_qwen_image() -> None:
    """Its modulation layers are what unslothai/unsloth#6716 is about."""
    model = tiny.diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    with torch.no_grad(), rows_seen(model) as seen:
        model(
            hidden_states=torch.randn(1, 16, 16),
            encoder_hidden_states=torch.randn(1, 7, 16),
            encoder_hidden_states_mask=torch.ones(1, 7, dtype=torch.long),
            timestep=torch.tensor([1.0]),
            img_shapes=[[(1, 4, 4)]],
        )
    assert {layer for layer, rows in seen.items() if rows == 1} == single_row_modules(model)


def test_unet() -> None:
    model = tiny.diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    with torch.no_grad(), rows_seen(model) as seen:
        model(torch.randn(1, 4, 16, 16), torch.tensor([1]), torch.randn(1, 5, 32))
    assert {layer for layer, rows in seen.items() if rows == 1} == single_row_modules(model)


def test_bert_pooler(checkpoints: Callable[[str], Path]) -> None:
    model = tiny.open_result(tiny.FAMILIES["bert"], checkpoints("bert"))
    with torch.no_grad(), rows_seen(model) as seen:
        tiny.tokens_step(model)
    assert {layer for layer, rows in seen.items() if rows == 1} == single_row_modules(model) == {"pooler.dense"}


@pytest.mark.parametrize("name", ["llama-tied", "opt", "t5", "mixtral", "qwen2-moe"])
def test_language_models_have_none(name: str, checkpoints: Callable[[str], Path]) -> None:
    model = tiny.open_result(tiny.FAMILIES[name], checkpoints(name))
    assert single_row_modules(model) == frozenset()
