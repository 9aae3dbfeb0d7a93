"""What a model's own forward cannot do with quantized weights is found before anything is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from torch import nn

import aoconvert
from aoconvert import schemes
from aoconvert.errors import PlanError
from aoconvert.inputs import find_inputs, first_tensors
from aoconvert.models import Skeleton, build_skeleton
from aoconvert.models.base import ModelPart
from aoconvert.models.forward_watch import Watch
from aoconvert.models.repeats import run_once, spread
from aoconvert.models.trial import Trial
from aoconvert.schemes import blocker
from aoconvert.schemes.apply import quantize_weight

D: Any = tiny.diffusers
T: Any = tiny.transformers

_TEXT = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_TEXT |= {"num_attention_heads": 2}
_SOUND = {
    **_TEXT,
    "num_hidden_layers": 4,
    "vocab_size": 32,
    "conv_dim": [32] * 2,
    "conv_kernel": [8, 8],
    "conv_stride": [4, 4],
}
_SOUND |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
_MAMBA = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 32}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}
_VISION = {**_TEXT, "image_size": 16, "patch_size": 4}
_PIXELS = {"input_size": 16, "visual_bbox": False, "coordinate_size": 8, "shape_size": 16}


def _hunyuan() -> Any:
    return D.HunyuanDiT2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=16, num_attention_heads=2, in_channels=4,
        cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=32, text_len=4,
        text_len_t5=4, activation_fn="gelu-approximate",
    )  # fmt: skip


def _text(name: str, config: str, **values: Any) -> Callable[[], Any]:
    return lambda: getattr(T, name)(getattr(T, config)(**{**_TEXT, **values}))


def _of(name: str, config: str, **values: Any) -> Callable[[], Any]:
    return lambda: getattr(T, name)(getattr(T, config)(**values))


@dataclass(frozen=True)
class Case:
    """A tiny model, and the layers that its forward cannot use quantized: what their names end with."""

    build: Callable[[], Any]
    faulty: tuple[str, ...] = ()


CASES: Mapping[str, Case] = {
    # a layer that multiplies its weight in a way of its own
    "falcon": Case(
        _of("FalconForCausalLM", "FalconConfig", vocab_size=64, hidden_size=64, num_hidden_layers=4,
            num_attention_heads=2),
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    # the weight is the other operand
    "mamba": Case(_of("MambaForCausalLM", "MambaConfig", **_MAMBA), ("dt_proj",)),
    "falcon-mamba": Case(_of("FalconMambaForCausalLM", "FalconMambaConfig", **_MAMBA)),  # not where it is quantized
    # weights that are scaled in place before the first forward
    "rwkv": Case(
        _of("RwkvForCausalLM", "RwkvConfig", vocab_size=64, hidden_size=64, attention_hidden_size=64,
            num_hidden_layers=4, context_length=32),
        ("attention.output", "feed_forward.value"),
    ),
    # a weight that torch's own attention multiplies; the others it hands to ``linear``
    "wavlm": Case(_of("WavLMForCTC", "WavLMConfig", **_SOUND), ("attention.out_proj",)),
    "hunyuan-dit": Case(_hunyuan, ("pooler.c_proj",)),
    # a table behind a linear layer's name
    "layoutlmv3": Case(
        _text("LayoutLMv3ForTokenClassification", "LayoutLMv3Config", **_PIXELS),
        ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    ),
    # a weight that is joined with another one
    "mobilebert": Case(
        _of("MobileBertForMaskedLM", "MobileBertConfig", vocab_size=64, hidden_size=64, embedding_size=32,
            num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, intra_bottleneck_size=32,
            num_feedforward_networks=1),
        ("predictions.dense",),
    ),
    "wav2vec2": Case(_of("Wav2Vec2ForCTC", "Wav2Vec2Config", **_SOUND)),
    "bert": Case(_text("BertForSequenceClassification", "BertConfig")),
    "llama": Case(_text("LlamaForCausalLM", "LlamaConfig")),
    "mixtral": Case(_text("MixtralForCausalLM", "MixtralConfig", num_key_value_heads=2)),
    "t5": Case(_of("T5ForConditionalGeneration", "T5Config", d_model=64, d_kv=32, d_ff=64, num_layers=2, num_heads=2,
                   vocab_size=64)),
    # forwards that look at values, and move tables between devices
    "bart": Case(_of("BartForConditionalGeneration", "BartConfig", vocab_size=64, d_model=64, encoder_layers=1,
                     decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
                     decoder_ffn_dim=64, max_position_embeddings=32)),
    "clip": Case(lambda: T.CLIPModel(T.CLIPConfig(text_config=_TEXT, vision_config=_VISION))),
    "deberta-v2": Case(_text("DebertaV2Model", "DebertaV2Config", **_RELATIVE)),
    "flux": Case(tiny.flux_transformer),
    "pixart": Case(tiny.pixart_transformer),
    "wan": Case(tiny.wan_transformer),
}  # fmt: skip
QUICK = ["falcon", "mamba", "wavlm", "layoutlmv3"]


@cache
def built(name: str) -> Any:
    torch.manual_seed(0)
    return CASES[name].build().eval()


def component_of(model: Any) -> ModelPart:
    library = "diffusers" if isinstance(model, D.ModelMixin) else "transformers"
    config = dict(model.config) if library == "diffusers" else json.loads(model.config.to_json_string())
    return ModelPart("", "", library, type(model).__name__, config)  # type: ignore[arg-type]


def dtypes_of(skeleton: Skeleton, dtype: torch.dtype) -> dict[str, torch.dtype]:
    return {spec.name: dtype if spec.floating and not spec.keep_fp32 else spec.dtype for spec in skeleton}


def trial_of(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Trial, Skeleton]:
    skeleton = build_skeleton(component_of(built(name)), dtype)
    return Trial(skeleton, dtypes_of(skeleton, dtype)), skeleton


def wanted(skeleton: Skeleton, scheme: schemes.Scheme) -> dict[str, schemes.Scheme]:
    """Every layer that the scheme can take."""
    layers = [spec for spec in skeleton if spec.kind == "linear" and not spec.tied_to and not spec.keep_fp32]
    return {spec.name: scheme for spec in layers if blocker(spec.shape, torch.bfloat16, scheme) is None}


def is_faulty(name: str, case: Case) -> bool:
    owner = name.removesuffix(".weight")
    return any(owner.endswith(f".{ending}") or owner == ending for ending in case.faulty)


def quantized(model: Any, names: Mapping[str, schemes.Scheme]) -> Any:
    """A copy in bfloat16, quantized in memory; as a loaded one it says so."""
    from copy import deepcopy

    copy = deepcopy(model).to(torch.bfloat16)
    for name, scheme in names.items():
        owner, _, leaf = name.rpartition(".")
        weight = quantize_weight(copy.get_parameter(name).detach(), scheme)
        setattr(copy.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
    for module in copy.modules():
        if isinstance(module, T.PreTrainedModel):
            module.config._is_quantized = True
    return copy


def forward(model: Any, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return first_tensors(model(**inputs))


ON_CPU = ("int8wo", "int8dq", "int4wo", "float8wo", "intx4wo", "intx8wo", "int8dq_int3")


@pytest.mark.parametrize(
    ("name", "scheme_name"),
    [
        pytest.param(name, scheme, marks=() if name in QUICK and scheme == "int8wo" else pytest.mark.exhaustive)
        for name in CASES
        for scheme in ON_CPU
    ],
)
def test_what_is_said_is_what_a_quantized_model_does(name: str, scheme_name: str) -> None:
    """What stays can be run with the rest quantized; each layer that is set aside alone makes the forward fail."""
    case = CASES[name]
    scheme = schemes.get(scheme_name, group_size=32 if scheme_name in ("int4wo", "intx4wo") else None)
    trial, skeleton = trial_of(name)
    asked = wanted(skeleton, scheme)
    faults = trial.faults(asked, quantize_weight, lambda item: item.key)
    expected = {layer for layer in asked if is_faulty(layer, case)}
    if scheme_name != "int4wo":
        assert set(faults) == expected
    # its kernel has no form without values, so that what a function of many weights does cannot be told
    assert all("multi_head_attention" in why for layer, why in faults.items() if layer not in expected)
    assert expected <= set(faults)
    model = built(name)
    inputs = find_inputs(quantized(model, {})).make("cpu")
    outputs = forward(quantized(model, dict.fromkeys(asked.keys() - faults, scheme)), inputs)
    assert outputs and all(output.isfinite().all() for output in outputs)
    for layer in [layer for layer in expected if re.search(r"\.[1-9]\.", layer) is None]:  # the first block
        with pytest.raises(Exception, match=r"."):
            forward(quantized(model, {layer: scheme}), inputs)


@pytest.mark.parametrize("name", ["rwkv", "hunyuan-dit"])
def test_what_is_said_of_models_that_are_slow(name: str) -> None:
    trial, skeleton = trial_of(name)
    asked = wanted(skeleton, schemes.get("int8wo"))
    faults = trial.faults(asked, quantize_weight, lambda item: item.key)
    assert set(faults) == {layer for layer in asked if is_faulty(layer, CASES[name])} != set()


@pytest.mark.parametrize(
    "name",
    ["mamba", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("wavlm", "rwkv", "hunyuan-dit", "layoutlmv3"))],
)
def test_the_result_runs(name: str, tmp_path: Path) -> None:
    """Opened by its library it gives what the model quantized in memory gives, and the manifest says what stays."""
    model = built(name).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    options = {"min_quantized": 0.0, "device": "cpu"}
    made = aoconvert.quantize(tmp_path / "source", "int8wo", output=tmp_path / "out", **options)  # type: ignore[arg-type]
    tensors = made.manifest.components[0].tensors
    left = {t.name for t in tensors if t.action != "quantize" and "does not support" in (t.reason or "")}
    assert left == {t.name for t in tensors if t.name.endswith("weight") and is_faulty(t.name, CASES[name])}
    scheme = schemes.get("int8wo")
    inputs = find_inputs(quantized(model, {})).make("cpu")
    reference = quantized(type(model).from_pretrained(tmp_path / "source", torch_dtype=torch.bfloat16).eval(),
                          {t.name: scheme for t in tensors if t.action == "quantize"})  # fmt: skip
    loaded = type(model).from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16).eval()
    pairs = zip(forward(loaded, inputs), forward(reference, inputs), strict=True)
    assert all(torch.equal(got, expected) for got, expected in pairs)


def test_a_class_that_can_run_nothing_so_is_refused(tmp_path: Path) -> None:
    built("falcon").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    with pytest.raises(PlanError) as caught:
        aoconvert.plan(tmp_path / "source", "int8wo", output=tmp_path / "out", min_quantized=0.0)
    (problem,) = caught.value.problems
    reason = "FalconLinear passes it to Tensor.T, which an Int8Tensor does not support"
    assert f"nothing is left to quantize ({reason}" in problem


_SMALL_FNET = {**_TEXT, "tpu_short_seq_length": 16}
FLOAT32_ONLY: Mapping[str, Callable[[], Any]] = {
    "deberta": _text("DebertaForSequenceClassification", "DebertaConfig", **_RELATIVE),
    "fnet": _text("FNetForMaskedLM", "FNetConfig", **_SMALL_FNET),
    "xlnet": _of("XLNetLMHeadModel", "XLNetConfig", vocab_size=64, d_model=64, n_layer=2, n_head=2, d_inner=128),
}


@pytest.mark.parametrize(
    "name", ["fnet", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("deberta", "xlnet"))]
)
def test_a_class_that_cannot_run_in_bfloat16_stays_in_its_own_dtype(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FLOAT32_ONLY[name]().eval()
    model.save_pretrained(tmp_path / "source")
    plan = aoconvert.plan(tmp_path / "source", "int8wo", output=tmp_path / "out", min_quantized=0.0)
    (line,) = [line for line in plan.warnings if "cannot run in bfloat16" in line]
    assert line.endswith("it stays in float32")
    made = aoconvert.quantize(tmp_path / "source", "int8wo", output=tmp_path / "out", min_quantized=0.0, device="cpu")
    assert made.manifest.components[0].dtype == "float32"
    assert {t.dtype for t in made.manifest.components[0].tensors if t.action != "keep" or t.sha256} <= {
        "float32",
        "int64",
    }
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    assert loaded.dtype == torch.float32
    assert all(output.isfinite().all() for output in forward(loaded, find_inputs(model).make("cpu")))


def test_a_dtype_that_was_asked_for_is_taken_and_a_line_says_that_it_does_not_run(tmp_path: Path) -> None:
    FLOAT32_ONLY["fnet"]().save_pretrained(tmp_path / "source")
    plan = aoconvert.plan(tmp_path / "source", "int8wo", output=tmp_path / "out", dtype="bfloat16", min_quantized=0.0)
    assert plan.components[0].dtype == "bfloat16"
    assert any("cannot run in bfloat16" in line and "--dtype float32" in line for line in plan.warnings)


SINGLE_ROWS: Mapping[str, tuple[Callable[[], Any], set[str]]] = {
    "pooled text": (
        _text("CLIPTextModelWithProjection", "CLIPTextConfig", projection_dim=32, eos_token_id=2),
        {"text_projection"},
    ),
    "classifier": (_text("BertForSequenceClassification", "BertConfig"), {"bert.pooler.dense", "classifier"}),
    "two towers": (
        lambda: T.CLIPModel(T.CLIPConfig(text_config=_TEXT, vision_config=_VISION)),
        {"visual_projection", "text_projection"},
    ),
    "a token each": (_text("BertForTokenClassification", "BertConfig"), set()),
    "a sound of a single frame": (
        lambda: D.AutoencoderOobleck(encoder_hidden_size=12, decoder_channels=12, decoder_input_channels=6,
                                     audio_channels=2, channel_multiples=[2, 4], downsampling_ratios=[2, 4]),
        set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE_ROWS)
def test_rows_are_counted(name: str) -> None:
    """What sees one row of a sample, however long that is."""
    build, expected = SINGLE_ROWS[name]
    skeleton = build_skeleton(component_of(build()), torch.bfloat16)
    seen = Trial(skeleton, dtypes_of(skeleton, torch.bfloat16)).seen
    assert seen.values is not None
    assert {spec.module for spec in skeleton if spec.kind == "linear" and seen.rows[spec.name] == 1} == expected


def test_a_single_row_stays_out_of_a_scheme_that_needs_more(tmp_path: Path) -> None:
    SINGLE_ROWS["pooled text"][0]().save_pretrained(tmp_path / "source")
    for skips in (True, False):
        plan = aoconvert.plan(tmp_path / "source", "int8dq", output=tmp_path / "out", default_skips=skips)
        (head,) = [t for t in plan.components[0].tensors if t.name == "text_projection.weight"]
        assert head.action != "quantize"
    assert "one row per sample" in (head.reason or "")


def test_answers_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AOCONVERT_CACHE_DIR", str(tmp_path))
    trial, skeleton = trial_of("mamba")
    asked = wanted(skeleton, schemes.get("int8wo"))
    faults = trial.faults(asked, quantize_weight, lambda item: item.key)
    files = sorted((tmp_path / "trials").glob("*.json"))
    assert len(files) == 2

    def never(*_: Any) -> Any:
        raise AssertionError("asked again")

    again, _ = trial_of("mamba")
    assert again.faults(asked, never, lambda item: item.key) == faults != {}
    for file in files:
        file.write_text("{")
    assert trial_of("mamba")[0].faults(asked, quantize_weight, lambda item: item.key) == faults


@pytest.mark.parametrize("name", ["llama", "wan", "gemma3"])
def test_repeated_blocks_run_once_and_answer_for_all(name: str) -> None:
    """As many rows everywhere as in a forward of every block; blocks that differ run themselves."""
    torch.manual_seed(0)
    blocks = {"num_hidden_layers": 7, "sliding_window": 4}
    model = {
        "llama": _text("LlamaForCausalLM", "LlamaConfig", num_hidden_layers=7),
        "wan": lambda: D.WanTransformer3DModel(**{**dict(tiny.wan_transformer().config), "num_layers": 5}),
        "gemma3": _text(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **blocks,
            head_dim=32,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        ),
    }[name]()
    skeleton = build_skeleton(component_of(model), torch.float32)
    seen = Trial(skeleton, dtypes_of(skeleton, torch.float32)).seen
    copy = model.eval().to("meta")
    weights = {key: parameter for key, parameter in copy.named_parameters() if key in seen.rows}
    inputs = find_inputs(copy).make("meta")
    with torch.no_grad(), Watch(weights, values=False) as every:
        copy(**inputs)
    assert every.rows == dict(seen.rows)
    with torch.no_grad(), Watch(weights, values=False) as once:
        likes = run_once(copy)
        copy(**inputs)
    assert len(once.rows) < len(every.rows)
    assert spread(once.rows, likes) == every.rows
    assert (5 if name == "wan" else 7) - len(likes) == (2 if name == "gemma3" else 1)


@pytest.mark.parametrize(
    ("use", "fault"),
    [
        (lambda x, w: nn.functional.linear(x, w), None),
        (lambda x, w: nn.functional.linear(x, weight=w, bias=None), "linear with named arguments"),
        (lambda x, w: nn.functional.linear(x.long(), w), None),  # the input's fault
        (lambda x, w: x @ w.T, "Tensor.T"),
        (lambda x, w: torch.einsum("bi,oi->bo", x, w), "einsum"),
        (lambda x, w: nn.functional.linear(x, w.to(x.dtype)), None),
        (lambda x, w: nn.functional.linear(x, w.view(4, 32, 64).flatten(0, 1)), "Tensor.view"),
        (lambda x, w: nn.functional.linear(x, torch.cat([w, w])), "cat"),
        (lambda x, w: nn.functional.linear(x, w + 1), "Tensor.add"),
    ],
)  # fmt: skip
def test_uses_of_a_weight(use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], fault: str | None) -> None:
    """Each is found, and the forward goes on as if the weight were plain; rows are counted."""
    weight = torch.empty(128, 64, dtype=torch.bfloat16, device="meta")
    held = nn.Parameter(quantize_weight(weight, schemes.get("int8wo")), requires_grad=False)
    with torch.no_grad(), Watch({"w": held}, values=False) as watch:
        out = use(torch.empty(3, 64, dtype=torch.bfloat16, device="meta"), held)
    assert out.shape[0] == 3
    assert [why.split(" passes it to ")[1].split(",")[0] for why in watch.faults.values()] == ([fault] if fault else [])
