"""Bad input: the exit code, one line for each thing that is wrong, at most one hint, and nothing left behind."""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import LLAMA, build_llama, build_sparse_llama, llama_tensors, shard, write_config
from helpers.published import PUBLISHED

FLUX = PUBLISHED / "black-forest-labs/FLUX.1-dev/transformer/config.json"


def tree(root: Path) -> dict[str, object]:
    return {
        str(path.relative_to(root)): path.stat().st_mtime_ns if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


@pytest.fixture
def refused(call: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """Run ``quantize`` on bad input and give the error's line."""

    def run(source: object, *options: object, code: int = 3, lines: int = 1, command: str = "quantize") -> str:
        arguments = [command, source, *options]
        if "--scheme" not in options:
            arguments += ["--scheme", "int8wo"]
        if "-o" not in options:
            arguments += ["-o", tmp_path / "out"]
        if "--device" not in options:
            arguments += ["--device", "cpu"]
        before = tree(tmp_path)
        done = call(*arguments)
        assert tree(tmp_path) == before, "something was left on disk"
        assert done.code == code, done.stderr
        assert done.stdout == ""
        said = done.stderr.splitlines()
        errors = [line for line in said if line.startswith("error: ")]
        hints = [line for line in said if line.startswith("hint: ")]
        assert len(errors) == lines, done.stderr
        assert len(hints) <= 1
        assert errors + hints == said, done.stderr
        assert "Traceback" not in done.stderr
        assert "unexpected" not in done.stderr, done.stderr
        again = call(*arguments, "--json")
        document = json.loads(again.stdout)["error"]
        assert again.code == document["exit_code"] == code
        assert list(document) == ["type", "message", "hint", "exit_code", "retryable", "problems"]
        assert len(document["problems"]) == lines
        assert document["retryable"] is False
        assert again.stderr == ""
        assert (document["hint"] is not None) == bool(hints)
        assert tree(tmp_path) == before
        return "\n".join(errors).removeprefix("error: ")

    return run


Refused = Callable[..., str]


# --- sources


def test_missing_folder(refused: Refused, tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "absent")


def test_folder_without_config(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert refused(tmp_path / "model") == "model has no config.json and no model_index.json"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"{", "config.json is not valid JSON (line 1)"),
        (b'{"a": 1,\n oops}', "config.json is not valid JSON (line 2)"),
        (b"\xff\xfe{}", "config.json is not UTF-8 text"),
        (b"[1, 2]", "config.json is not a JSON object"),
        (b"", "config.json is not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{}", "neither _class_name (diffusers) nor architectures (transformers)"),
        (b'{"model_type": "llama"}', "names no architectures"),
        (b'{"architectures": []}', "neither _class_name"),
        (b'{"architectures": [], "_class_name": 5}', "_class_name is not a string: 5"),
    ],
)
def test_broken_config(refused: Refused, tmp_path: Path, content: bytes, what: str) -> None:
    source = build_llama(tmp_path / "model")
    (source / "config.json").write_bytes(content)
    assert what in refused(source)


def test_a_config_without_sizes_is_the_library_s_default(refused: Refused, tmp_path: Path) -> None:
    """transformers takes it, for a model of the default size, which these weights are not."""
    source = build_llama(tmp_path / "model")
    (source / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    said = refused(source, lines=2)
    assert (
        "model.embed_tokens.weight has the shape [128, 64] in model.safetensors, but its class expects [32000, 4096]"
        in said
    )


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_broken_model_index(refused: Refused, tmp_path: Path, command: str) -> None:
    write_config(tmp_path / "model", {"transformer": ["diffusers", "X"]}, "model_index.json")
    assert "names the part 'transformer', which does not exist" in refused(tmp_path / "model", command=command)
    write_config(tmp_path / "model", {"../up": ["diffusers", "X"]}, "model_index.json")
    assert "names the part '../up', which does not exist" in refused(tmp_path / "model", command=command)
    write_config(tmp_path / "model", {}, "model_index.json")
    assert "has no _class_name" in refused(tmp_path / "model", command=command)


def test_class_that_does_not_exist(refused: Refused, tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model", architectures=["LlamaForNothing"])
    assert "has no model class 'LlamaForNothing'" in refused(source)
    write_config(tmp_path / "other", {"_class_name": "NoTransformer3DModel"})
    assert "has no model class 'NoTransformer3DModel'" in refused(tmp_path / "other")
    write_config(tmp_path / "third", {"_class_name": "DDIMScheduler"})
    assert "has no model class 'DDIMScheduler'" in refused(tmp_path / "third")


def test_config_that_the_class_refuses(refused: Refused, tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model")
    write_config(source, {**LLAMA, "hidden_size": "wide"})
    assert "LlamaForCausalLM does not accept its config.json" in refused(source)
    write_config(tmp_path / "flux", {**json.loads(FLUX.read_text()), "num_layers": "many"})
    assert "FluxTransformer2DModel does not accept its config.json" in refused(tmp_path / "flux")


def test_repo_that_is_not_cached(refused: Refused, tmp_path: Path) -> None:
    options = ("--local-files-only", "--cache-dir", tmp_path / "cache")
    assert "someone/some-model" in refused("someone/some-model", *options, code=5)


def test_already_quantized_source(refused: Refused, tmp_path: Path, call: Callable[..., Any]) -> None:
    source = build_llama(tmp_path / "model")
    options = ("--scheme", "int8wo", "--device", "cpu", "-o", tmp_path / "quantized")
    assert call("quantize", source, *options).code == 0
    assert refused(tmp_path / "quantized") == "LlamaForCausalLM is already quantized (torchao)"


# --- weights


def header(tensors: dict[str, Any], *, data: int = 0) -> bytes:
    raw = json.dumps(tensors).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\1\2\3",
        b"<!DOCTYPE html><html>404</html>",
        struct.pack("<Q", 10**15) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 5) + b"hello",
        struct.pack("<Q", 2) + b"[]",
        header({"a": 5}),
        header({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}, data=4),
        header({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 6]}}, data=6),
        header({"a": {"dtype": "BF16", "shape": [-4], "data_offsets": [0, 8]}}, data=8),
        header({"a": {"dtype": "XX", "shape": [4], "data_offsets": [0, 8]}}, data=8),
        header({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [8, 0]}}, data=8),
    ],
)
def test_corrupt_safetensors(refused: Refused, tmp_path: Path, content: bytes) -> None:
    source = build_llama(tmp_path / "model")
    (source / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refused(source)


@pytest.mark.parametrize("keep", [4, 100, 0.5, -1])
def test_truncated_safetensors(refused: Refused, tmp_path: Path, keep: float) -> None:
    source = build_llama(tmp_path / "model")
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[: int(len(content) * keep) if keep == 0.5 else int(keep)])
    assert "model.safetensors" in refused(source)


def test_absent_shard(refused: Refused, tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model")
    shard(source, "model", 3)
    (source / "model-00002-of-00003.safetensors").unlink()
    assert "'model-00002-of-00003.safetensors' does not exist" in refused(source)


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "../other.safetensors", "a/../../x.safetensors"])
def test_index_that_leaves_the_folder(refused: Refused, tmp_path: Path, path: str) -> None:
    source = build_llama(tmp_path / "model")
    shard(source, "model")
    index = source / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = path
    index.write_text(json.dumps(values))
    assert f"shard '{path}' is outside the folder" in refused(source)


def test_index_that_is_wrong(refused: Refused, tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model")
    shard(source, "model")
    index = source / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["ghost.weight"] = "model-00003-of-00002.safetensors"
    index.write_text(json.dumps(values))
    assert "model-00003-of-00002.safetensors" in refused(source)
    index.write_text("{}")
    assert "has no weight_map" in refused(source)


def test_nan_in_a_weight(refused: Refused, tmp_path: Path) -> None:
    tensors = llama_tensors()
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 7] = torch.nan
    assert refused(build_llama(tmp_path / "nan", tensors=tensors), code=1) == f"{name} holds NaN or infinity"
    tensors[name][3, 7] = -torch.inf
    assert refused(build_llama(tmp_path / "inf", tensors=tensors), code=1) == f"{name} holds NaN or infinity"


def test_shapes_and_missing_tensors(refused: Refused, tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.bfloat16)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    said = refused(build_llama(tmp_path / "model", tensors=tensors), lines=2)
    assert "model.norm.weight has the shape [32] in model.safetensors, but its class expects [64]" in said
    assert "the checkpoint does not hold model.layers.0.mlp.up_proj.weight" in said


def test_unexpected_tensors_are_a_warning(call: Callable[..., Any], tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model", tensors={**llama_tensors(), "extra.bias": torch.zeros(3)})
    done = call("quantize", source, "--scheme", "int8wo", "--device", "cpu", "-o", tmp_path / "out", "-q")
    assert (done.code, done.stdout, done.stderr) == (0, f"{tmp_path / 'out'}\n", "")
    done = call("plan", source, "--scheme", "int8wo", "--device", "cpu", "-o", tmp_path / "other")
    assert done.code == 0
    assert done.stderr.startswith("warning: ")
    assert "extra.bias" in done.stderr
    assert len(done.stderr.splitlines()) == 1


class _Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_that_calls_the_system(refused: Refused, tmp_path: Path, legacy: bool) -> None:
    source = build_llama(tmp_path / "model")
    (source / "model.safetensors").unlink()
    values = {**llama_tensors(), "evil": _Evil(tmp_path / "canary")}
    torch.save(values, source / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    said = refused(source)
    assert "pytorch_model.bin" in said
    assert "system" in said
    assert not (tmp_path / "canary").exists()


def test_bare_pickle(refused: Refused, tmp_path: Path) -> None:
    source = build_llama(tmp_path / "model")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil(tmp_path / "canary")))
    assert "pytorch_model.bin" in refused(source)
    assert not (tmp_path / "canary").exists()


# --- options


@pytest.mark.parametrize("scheme", ["int8w0", "Int8WeightOnly", "float8"])
def test_unknown_scheme(refused: Refused, llama: Path, call: Callable[..., Any], tmp_path: Path, scheme: str) -> None:
    assert f"there is no scheme {scheme!r}" in refused(llama, "--scheme", scheme, code=2)
    done = call("quantize", llama, "--scheme", "int8w0", "-o", tmp_path / "out")
    assert "did you mean int8wo" in done.stderr


@pytest.mark.parametrize("setting", ["", "=", "=1", "granularity", "no_such_field=1", "granularity=maybe", "version=x"])
def test_bad_setting(refused: Refused, llama: Path, setting: str) -> None:
    assert refused(llama, "--set", setting, code=2)


@pytest.mark.parametrize("pattern", ["re:[", "re:(", "re:*", "re:(?P<n>a)(?P<n>b)"])
def test_bad_regex(refused: Refused, llama: Path, pattern: str) -> None:
    assert "is not a regular expression" in refused(llama, "--skip", pattern, code=2)


@pytest.mark.parametrize(
    "options",
    [
        ("--max-shard-size", "5 apples"),
        ("--max-shard-size", "0"),
        ("--max-shard-size", "9" * 400 + "GBB"),
        ("--min-quantized", "2"),
        ("--min-quantized", "nan"),
        ("--group-size", "0"),
        ("--group-size", "32", "--scheme", "int8dq"),
        ("--dtype", "int4"),
        ("--device", "tpu"),
        ("--revision", "main"),
        ("--set", "granularity=per_row", "--set", "granularity=per_tensor"),
        ("--component", "=int8wo"),
        ("--component", "vae="),
        ("--component", "vae=int8wo", "--component", "vae=float8wo"),
        ("--scheme", "auto", "--min-sqnr", "30", "--candidates", "int8wo,"),
        ("--scheme", "auto", "--target-bits", "nan"),
    ],
)
def test_bad_options(refused: Refused, llama: Path, options: tuple[str, ...]) -> None:
    assert refused(llama, *options, code=2)


def test_a_recipe_for_two_devices(refused: Refused, llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    rule = '[[rule]]\nmatch = "re:.*[qk]_proj"\nscheme = "int4wo"\ngroup_size = 32\nlayout_device = '
    recipe.write_text(f'{rule}"cuda"\n{rule.replace("qk", "vo")}"cpu"\n')
    said = refused(llama, "--recipe", recipe, "--min-quantized", "0")
    assert said == "packed layouts for cpu and cuda in one model"


def test_device_that_is_not_here(refused: Refused, llama: Path) -> None:
    assert "device cuda:99 is not available" in refused(llama, "--device", "cuda:99")


def test_components(refused: Refused, pipeline: Path, llama: Path) -> None:
    assert "the pipeline's models are" in refused(pipeline, "--component", "unet")
    options = ("--component", "transformer", "--component", "text_encoder", "--component-only")
    assert refused(pipeline, *options) == "--component-only takes one component, not 2"
    assert "not a pipeline" in refused(llama, "--component", "transformer")
    assert "there is no scheme 'nope'" in refused(pipeline, "--component", "transformer=nope", code=2)


def test_several_things_wrong(refused: Refused, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    wrong = ("--skip", "nothing", "--skip", "re:x", "--device", "cuda:99")
    said = refused(llama, *wrong, "-o", tmp_path / "elsewhere", lines=3)
    for part in ("device cuda:99", "'nothing'", "'re:x'"):
        assert part in said
    assert "is not empty" in refused(llama, *wrong)  # that needs no torch, and comes first


# --- outputs


def test_output_that_is_not_empty(refused: Refused, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    assert "exists and is not empty" in refused(llama)
    assert "it holds file, and is not a result of aoconvert" in refused(llama, "--overwrite")
    assert (tmp_path / "out" / "file").read_text() == "mine"


def test_output_in_or_over_the_source(refused: Refused, llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "up" / "model"
    shutil.copytree(llama, source)
    assert "is inside the source" in refused(source, "-o", source / "out")
    assert "is inside the source" in refused(source, "-o", source / "a" / "b" / "out")
    for output in (source, tmp_path / "up", source.parent / "model" / "."):
        for options in ((), ("--overwrite",)):
            assert "would replace the source" in refused(source, "-o", output, *options, lines=2)
    for output in (source / "..", source / "x" / ".."):
        lines = 3 if output.exists() else 2
        assert "would replace the source" in refused(source, "-o", output, lines=lines)
    (tmp_path / "beside").mkdir()
    assert "has no name" in refused(source, "-o", tmp_path / "beside" / "new" / "..")
    assert "output / has no name" in refused(source, "-o", "/", lines=3)
    (tmp_path / "link").symlink_to(source, target_is_directory=True)
    assert "is inside the source" in refused(source, "-o", tmp_path / "link" / "out")


def test_output_that_is_no_folder(refused: Refused, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty", target_is_directory=True)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    assert refused(llama, "-o", tmp_path / "file") == f"output {tmp_path / 'file'} exists and is not a folder"
    for name in ("link", "broken"):
        assert refused(llama, "-o", tmp_path / name).startswith(f"output {tmp_path / name} is a link")
    said = refused(llama, "-o", tmp_path / "file" / "deep" / "out")
    assert said == f"output {tmp_path / 'file' / 'deep' / 'out'}: {tmp_path / 'file'} is not a folder"
    assert "File name too long" in refused(llama, "-o", tmp_path / ("x" * 300))
    assert refused(llama, "-o", "/proc/no/such/place")


def test_disk_too_small(refused: Refused, call: Callable[..., Any], tmp_path: Path) -> None:
    """A sparse file: it looks like 812 GB of weights, and takes none."""
    config = json.loads((PUBLISHED / "meta-llama/Llama-3.1-405B" / "config.json").read_text())
    source = build_sparse_llama(tmp_path / "model", config)
    weights = source / "model.safetensors"
    assert weights.stat().st_size > 811e9
    assert weights.stat().st_blocks * 512 < 10**6
    if shutil.disk_usage(tmp_path).free > 500e9:
        pytest.skip("this disk is large enough for the result")
    said = refused(source)
    free = shutil.disk_usage(tmp_path).free / 1e9
    assert "410.16 GB needed, " in said
    assert float(said.partition("needed, ")[2].split()[0]) == pytest.approx(free, rel=0.05)
    # the dry run says the same; of the config alone the plan is a calculation, with a warning
    arguments = ("plan", source, "--scheme", "int8wo", "--device", "cpu", "-o", tmp_path / "out")
    assert call(*arguments).code == 3
    weights.unlink()
    done = call(*arguments)
    assert done.code == 0
    assert "410.16 GB needed" in done.stderr
