"""Every scheme's checkpoint: what verify proves here, and what it says where this machine cannot run it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import tiny

import aoconvert
from aoconvert import schemes
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.checkpoint import Checkpoint, from_manifest
from aoconvert.checkpoint.load_code import load_code
from aoconvert.checkpoint.report import Report
from aoconvert.schemes import int4, int4_parts
from aoconvert.schemes.apply import quantize_weight
from aoconvert.schemes.tensors import dequantize, take_apart
from aoconvert.verification.children import load_child
from aoconvert.verification.load_device import choose_load_device

CELLS = [*((entry.name, None) for entry in schemes.catalogue()), ("int4wo", "cuda"), ("int4wo", "xpu")]
RECIPE = """
default = "int8wo"
rule = [
  { match = 're:.*\\.q_proj', scheme = "float8dq_row" },
  { match = 're:.*\\.v_proj', scheme = "mxfp6_e2m3" },
  { match = 're:.*\\.k_proj', scheme = "nvfp4wo" },
  { match = 're:.*\\.o_proj', scheme = "int4wo", layout_device = "cpu", group_size = 64 },
  { match = 're:.*\\.up_proj', scheme = "float8wo" },
  { match = 're:.*\\.gate_proj', scheme = "uint3wo" },
]
"""


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that every scheme can take, with rows of zeros, and sizes that fill no tile of a swizzled layout."""
    folder = tmp_path_factory.mktemp("wide") / "source"
    config = transformers.LlamaConfig(
        vocab_size=80, hidden_size=256, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=48, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).bfloat16()
        with torch.no_grad():
            layer = model.model.layers[0]
            layer.mlp.up_proj.weight[5:9] = 0
            layer.self_attn.k_proj.weight.zero_()  # not v: float8 activations of zeros become NaN
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mixed(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven classes of tensors in one checkpoint, the embedding table among them."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "recipe.toml").write_text(RECIPE)
    aoconvert.quantize(
        wide, None, recipe=folder / "recipe.toml", output=folder / "out", device="cpu", include_embeddings=True,
        min_quantized=0,
    )  # fmt: skip
    return folder / "out"


@pytest.fixture(scope="session")
def packed(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``int4wo`` for a device, once a session. Read only."""
    made: dict[str, Path] = {}

    def get(device: str) -> Path:
        if device not in made:
            made[device] = tmp_path_factory.mktemp(device) / "out"
            aoconvert.quantize(wide, "int4wo", layout_device=device, output=made[device], device="cpu", min_quantized=0)
        return made[device]

    return get


def statuses(report: Report) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def runs_here(device: str, capability: Any) -> bool:
    """Whether this machine has what a layout is for."""
    if device in ("any", "cpu"):
        return True
    backend = getattr(torch, device)
    return backend.is_available() and (capability is None or torch.cuda.get_device_capability() >= tuple(capability))


@pytest.mark.gpu
@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "device"), CELLS)
def test_every_scheme(name: str, device: str | None, wide: Path, tmp_path: Path) -> None:
    """All checks pass where the device is; elsewhere it opens, its bits are right, and nothing claims more."""
    options: dict[str, Any] = {"layout_device": device} if device else {}
    result = aoconvert.quantize(wide, name, output=tmp_path / "out", device="cpu", min_quantized=0, **options)
    report = aoconvert.verify(tmp_path / "out", source=str(wide))
    layout = result.manifest.components[0].layout
    expected = "passed" if runs_here(layout.device, layout.min_capability) else "skipped"
    kinds = statuses(report)
    assert kinds.pop("forward") == kinds.pop("versions") == expected, report.to_dict()
    assert set(kinds.values()) == {"passed"}, report.to_dict()
    assert report.strategy == "from-pretrained"
    assert aoconvert.verify(tmp_path / "out", require_device=True, reload=False).ok == (expected == "passed")


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", ["from-pretrained", pytest.param("assign", marks=pytest.mark.exhaustive)])
def test_seven_schemes_in_one_model(strategy: str, mixed: Path, wide: Path) -> None:
    """With rows of zeros, padded scales and a quantized embedding table: every check passes, forward included."""
    [entry] = manifests.load(mixed).components
    assert len(entry.scheme.split("+")) == 7
    assert sum(tensor.repaired_rows for tensor in entry.tensors) == 5  # the weight of zeros has one scale for all
    report = aoconvert.verify(mixed, source=str(wide), strategy=strategy)
    assert set(statuses(report).values()) == {"passed"}, report.to_dict()
    assert report.strategy == strategy
    [forward] = report.forward
    assert (forward.status, forward.output_sqnr_db is not None) == ("passed", True)
    assert json.loads((mixed / "aoconvert.verify.json").read_text())["forward"] == report.to_dict()["forward"]


def test_what_is_imported_is_enough_for_a_fresh_torch(mixed: Path) -> None:
    [entry] = manifests.load(mixed).components
    modules = {name.rpartition(".")[0] for name in entry.safe_globals if name.startswith("torchao.prototype.")}
    assert modules and modules <= set(entry.imports)


# --- machines that cannot run it


def target_of(folder: Path, **layout: Any) -> Checkpoint:
    """The checkpoint, its layout said to be another."""
    manifest = manifests.load(folder)
    [entry] = manifest.components
    changed = entry.model_copy(update={"layout": entry.layout.model_copy(update=layout)})
    return from_manifest(folder, manifest.model_copy(update={"components": [changed]}))


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_a_device_that_is_not_here(device: str, packed: Callable[[str], Path]) -> None:
    if getattr(torch, device).is_available():
        pytest.skip("there is such a device here")
    place = choose_load_device(target_of(packed(device)), "auto")
    assert (place.device, place.obstacle) == (
        "cpu",
        f"its layout is for {device}, and this device is not available here",
    )
    with pytest.raises(aoconvert.AoconvertError, match=f"device {device} is not available"):
        choose_load_device(target_of(packed(device)), device)


def test_any_device_is_opened_on_the_cpu(mixed: Path) -> None:
    place = choose_load_device(target_of(mixed, device="any", min_capability=[99, 0]), "auto")
    assert (place.device, place.obstacle) == ("cpu", None)


@pytest.mark.gpu
def test_a_gpu_that_is_too_old(mixed: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    place = choose_load_device(target_of(mixed, device="any", min_capability=[99, 0]), "cuda")
    assert place.obstacle is not None and "needs CUDA capability 99.0" in place.obstacle


def other_layout() -> str:
    return "avx2" if int4.machine_layout() != "avx2" else "avx512"


def test_int4_for_another_cpu(packed: Callable[[str], Path]) -> None:
    """It would load and give wrong numbers without a word."""
    assert choose_load_device(target_of(packed("cpu")), "auto").obstacle is None
    target = target_of(packed("cpu"), packing=f"plain+opaque_{other_layout()}")
    obstacle = choose_load_device(target, "auto").obstacle
    assert obstacle is not None and other_layout() in obstacle and int4.machine_layout() in obstacle


@pytest.mark.parametrize("layout", ["avx512", "avx2", "pairs16"])
def test_the_numbers_of_another_cpu_s_int4(layout: str) -> None:
    weight = torch.randn(144, 256).bfloat16()
    here: Any = quantize_weight(weight, schemes.get("int4wo", layout_device="cpu"))
    there = int4_parts.opaque(take_apart(here), layout)
    assert torch.equal(dequantize(there, int4.cpu_layout(f"opaque_{layout}")), dequantize(here))


# --- scales of zero


def found_in(tensor: torch.Tensor) -> list[str]:
    problems: list[str] = load_child.describe(tensor)["problems"]
    return problems


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4wo", "mxfp4", "mxfp8", "float8dq_row", "int8wo", "uint4wo"])
@pytest.mark.parametrize("shape", [(128, 256), (144, 32), (16, 96), (48, 512)])
def test_padding_is_no_scale(name: str, shape: tuple[int, int]) -> None:
    assert found_in(quantize_weight(torch.randn(shape).bfloat16(), schemes.get(name))) == []


@pytest.mark.parametrize(
    ("name", "device", "inner"),
    [
        ("nvfp4wo", None, "scale"),
        ("nvfp4", None, "per_tensor_scale"),
        ("float8dq_row", None, "scale"),
        ("int8wo", None, "scale"),
        ("uint4wo", None, "scale"),
        ("int4wo", "cpu", "scale_and_zero"),
        ("int4wo", "cuda", "scale_and_zero"),
        ("int4wo", "xpu", "scale"),
    ],
)
def test_a_scale_that_became_zero(name: str, device: str | None, inner: str) -> None:
    made: Any = quantize_weight(torch.randn(48, 256).bfloat16(), schemes.get(name, layout_device=device))
    assert found_in(made) == []
    getattr(made, inner).reshape(-1)[:1].view(torch.uint8).zero_()  # a view, of any dtype
    assert found_in(made) == [f"{inner} is zero"]


def test_a_row_of_zeros_that_was_not_repaired() -> None:
    weight = torch.randn(48, 256).bfloat16()
    weight[3] = 0
    assert "scale is zero" in found_in(quantize_weight(weight, schemes.get("float8wo")))


# --- the code


def test_the_device_of_the_code(packed: Callable[[str], Path], mixed: Path) -> None:
    assert "device = 'cuda'\n" in load_code(
        from_manifest(packed("cuda"), manifests.load(packed("cuda"))), "x", "assign"
    )
    code = load_code(target_of(mixed, device="any", min_capability=[8, 9]), "x", "from-pretrained")
    assert (
        'device = "cuda" if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9) else "cpu"'
        in code
    )
    names: dict[str, Any] = {"torch": torch}
    exec(next(line for line in code.splitlines() if line.startswith("device = ")), names)
    assert names["device"] in ("cuda", "cpu")


def test_fused_projections(tmp_path: Path) -> None:
    """The code fuses the empty model first; what it opens has the fused layers only, and runs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny.sd3_transformer().bfloat16().save_pretrained(tmp_path / "source")
    aoconvert.quantize(
        tmp_path / "source", "int8wo", fuse_qkv=True, output=tmp_path / "out", device="cpu", min_quantized=0
    )
    target = from_manifest(tmp_path / "out", manifests.load(tmp_path / "out"))
    assert target.fused
    model = aoconvert.load(tmp_path / "out")
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    assert "to_qkv" in names and not names & {"to_q", "to_k", "to_v"}
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.exhaustive
def test_fused_projections_verify(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoints("flux")
    components = {"transformer": "int8wo", "text_encoder_2": "float8wo"}
    aoconvert.quantize(
        source, "int8wo", components=components, fuse_qkv=True, output=tmp_path / "out", device="cpu", min_quantized=0
    )
    report = aoconvert.verify(tmp_path / "out", source=str(source))
    assert set(statuses(report).values()) == {"passed"}, report.to_dict()
    assert report.strategy == "assign"


def test_only_diffusers_models_are_fused(mixed: Path) -> None:
    manifest = manifests.load(mixed)
    fused = manifest.components[0].model_copy(update={"fused_qkv": True})
    with pytest.raises(aoconvert.SourceError, match="fused projections"):
        from_manifest(mixed, manifest.model_copy(update={"components": [fused]}))


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [{}, {"untie": True}], ids=["tied", "untied"])
def test_quantized_embeddings(options: dict[str, Any], checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoints("llama-tied")
    output = tmp_path / "out"
    aoconvert.quantize(source, "int8wo", include_embeddings=True, output=output, device="cpu", **options)
    report = aoconvert.verify(output, source=str(source))
    assert set(statuses(report).values()) == {"passed"}, report.to_dict()


@pytest.mark.exhaustive
def test_quantized_experts(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoints("mixtral")
    aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu", min_quantized=0.8)
    assert json.loads((tmp_path / "out/config.json").read_text())["experts_implementation"] == "eager"
    report = aoconvert.verify(tmp_path / "out", source=str(source))
    assert set(statuses(report).values()) == {"passed"}, report.to_dict()


@pytest.mark.exhaustive
def test_a_prototype_s_class_by_somebody_else(tmp_path: Path) -> None:
    """transformers' own config and torch.save: what has to be imported is read off the pickle."""
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig

    from aoconvert.engine.model_config import quantization_config

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).bfloat16()
    scheme = schemes.get("nvfp4wo")
    state = {
        name: quantize_weight(tensor, scheme) if "proj" in name else tensor
        for name, tensor in model.state_dict().items()
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    values = {
        **config.to_dict(),
        "quantization_config": quantization_config("transformers", NVFP4WeightOnlyConfig(), []),
    }
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    report = aoconvert.verify(tmp_path)
    assert report.ok, report.to_dict()
    assert "torchao.prototype.mx_formats.nvfp4_tensor" in report.imports
    assert statuses(report)["forward"] == "passed"
