"""What scripts depend on: streams, exit codes, JSON keys, and a quick start without torch."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import build_llama
from helpers.forking import WITH_LIBRARIES, Forker
from helpers.published import PUBLISHED

import aoconvert

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "quantize",
    "plan",
    "verify",
    "card",
    "push",
    "inspect",
    "diff",
    "schemes",
    "repack",
    "convert",
    "migrate",
    "bench",
]
COMMANDS += ["eval", "release", "env", "cache", "demo"]
HEAVY = ("torch", "torchao", "diffusers", "transformers", "accelerate", "huggingface_hub", "pydantic", "numpy")

Call = Callable[..., Any]


def run(*arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-m", "aoconvert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **options)


# --- a quick start


@pytest.mark.parametrize(
    "arguments",
    [
        *[["--help"], ["-h"], ["--version"], [], ["plan", "--help"], ["quantize", "-h"], ["plan"], ["nosuch"]],
        *[["quantize", "x", "--schem"], ["schemes"], ["schemes", "int8wo"], ["schemes", "nosuch"]],
    ],
    ids=" ".join,
)
def test_torch_is_not_imported(arguments: list[str]) -> None:
    code = f"""
import atexit, sys
from aoconvert.cli.main import main
atexit.register(lambda: print("\\nHEAVY", sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr))
main({arguments!r})
""".replace(f"{HEAVY!r} &", f"set({HEAVY!r}) &")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stderr.splitlines()[-1] == "HEAVY []", done.stderr


def test_refusals_import_no_torch(tmp_path: Path) -> None:
    """What is wrong with names, places and configs is said before the seconds that an import takes."""
    model = build_llama(tmp_path / "model")
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    quantized = build_llama(tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao"}
    (quantized / "config.json").write_text(json.dumps(config))
    scheme = ["--scheme", "int8wo"]
    refusals: list[tuple[int, str, list[object]]] = [
        (3, "no such folder", ["quantize", "./absent", *scheme]),
        (3, "it holds notes.txt, and is not a result of aoconvert", ["quantize", model, *scheme, "-o", other]),
        (3, "has no name; give the folder", ["quantize", model, *scheme, "-o", "/"]),
        (3, "is already quantized", ["quantize", quantized, *scheme, "-o", tmp_path / "new"]),
        (3, "is already quantized", ["plan", quantized, *scheme]),
        (2, "'gpu' is not a device", ["quantize", model, *scheme, "--device", "gpu"]),
        (2, "'gpu' is not a device", ["verify", model, "--device", "gpu"]),
        (2, "did you mean int8wo", ["quantize", model, "--scheme", "int8"]),
        (3, "no such folder", ["verify", "./absent"]),
        (2, "no such folder", ["verify", model, "--source", "./absent"]),
        (3, "no such folder", ["repack", "./absent", "--layout-device", "cuda"]),
        (3, "is not a folder", ["repack", model / "config.json", "--layout-device", "cuda"]),
        (3, "no such folder", ["card", "./absent"]),
        (2, "there is no scheme 'nosuch'", ["demo", tmp_path / "demo", "--scheme", "nosuch"]),
        (3, "is not an earlier demo", ["demo", other]),
        (3, "no such folder", ["push", "me/model", "./absent"]),
        (2, "did you mean quantize?", ["quantise", "x"]),
    ]
    for error, (exit_code, said, arguments), torch in called(refusals):
        assert not torch, arguments
        assert error["exit_code"] == exit_code, (arguments, error)
        assert said in f"{error['message']} {error['hint']}", (arguments, error)


def called(
    refusals: list[tuple[int, str, list[object]]], prefix: Sequence[str] = ()
) -> Iterator[tuple[Any, Any, bool]]:
    """Refused commands in one new process: the error of each, the expectation, and whether torch was imported."""
    code = """
import json, sys
from aoconvert.cli.main import main
for arguments in json.load(sys.stdin):
    try:
        main([*arguments, "--json"])
    except SystemExit:
        print(json.dumps("torch" in sys.modules))
"""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code],
        input=json.dumps([[str(word) for word in arguments] for _, _, arguments in refusals]),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for document, refusal, torch in zip(lines[::2], refusals, lines[1::2], strict=True):
        yield document["error"], refusal, torch


def test_what_may_not_be_read_is_refused_by_name(tmp_path: Path) -> None:
    """No permission is no bug to report, and a folder that nobody may look into is no model on the Hub."""
    prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if prefix and shutil.which("setpriv") is None:
        pytest.skip("as root, without setpriv, everything may be read")
    (tmp_path / "closed").mkdir()
    build_llama(tmp_path / "closed" / "model")
    hidden = tmp_path / "closed" / "model"
    source = build_llama(tmp_path / "model")
    done = aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    (done.output / "pytorch_model.bin").chmod(0)
    locked = build_llama(tmp_path / "locked")
    (locked / "generation_config.json").chmod(0)
    (tmp_path / "closed").chmod(0)
    scheme = ["--scheme", "int8wo", "-o", tmp_path / "new"]
    refusals: list[tuple[int, str, list[object]]] = [
        (3, "model' cannot be opened: Permission denied", ["quantize", hidden, *scheme]),
        (3, "model' cannot be opened: Permission denied", ["inspect", hidden]),
        (3, "model' cannot be opened: Permission denied", ["verify", hidden]),
        (3, "closed cannot be read: Permission denied", ["plan", tmp_path / "closed", *scheme]),
        (3, "aoconvert.json cannot be read: Permission denied", ["card", hidden]),
        (3, "aoconvert.json cannot be read: Permission denied", ["push", "me/model", hidden]),
        (3, "aoconvert.json cannot be read: Permission denied", ["repack", hidden, "--layout-device", "cuda"]),
        (3, "generation_config.json cannot be read: no permission", ["quantize", locked, *scheme, "--device", "cpu"]),
        (3, "Permission denied", ["quantize", source, "--scheme", "int8wo", "-o", tmp_path / "closed" / "out"]),
        (3, "pytorch_model.bin cannot be read: no permission", ["push", "me/model", done.output]),
        (3, "pytorch_model.bin cannot be read: no permission", ["push", "me/model", done.output, "--rehash"]),
    ]
    try:
        for error, (exit_code, said, arguments), _ in called(refusals, prefix):
            assert error["exit_code"] == exit_code, (arguments, error)
            assert any(said in line for line in error["problems"]), (arguments, error)
            assert "report" not in (error["hint"] or ""), (arguments, error)
        command = [*prefix, sys.executable, "-m", "aoconvert", "verify", done.output, "--json"]
        verified = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT, check=False)
        assert verified.returncode == 4, verified
        assert (
            json.loads(verified.stdout)["checks"][-1]["detail"] == "pytorch_model.bin cannot be read: Permission denied"
        )
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_little_is_imported_for_help() -> None:
    """What takes the time of ``--help`` is imports: click, our command line, and what those two need."""
    code = "import sys; from aoconvert.cli.main import cli; import aoconvert.cli.quantize; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    ours = [name for name in done.stdout.split() if name.startswith("aoconvert")]
    others = {name.partition(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names) - {"aoconvert"}
    outside = {name for name in others if not name.startswith("_")}
    assert outside <= {"click", "packaging", "sitecustomize"}, outside
    assert len(ours) < 25, ours


# --- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(call: Call, command: str) -> None:
    for flag in ("-h", "--help"):
        done = call(command, flag)
        assert (done.code, done.stderr) == (0, "")
        lines = [line.strip() for line in done.stdout.splitlines()]
        examples = lines[lines.index("Examples:") + 1 :]
        assert examples
        assert all(line.startswith(f"aoconvert {command}") for line in examples if line)
        for option in ("--json", "--quiet", "--no-progress", "--help"):
            assert option in done.stdout


def test_group_help_and_version(call: Call) -> None:
    from aoconvert import __version__

    done = call("--help")
    assert (done.code, done.stderr) == (0, "")
    assert all(command in done.stdout for command in COMMANDS)
    assert "130 interrupted" in done.stdout
    done = call("--version")
    others = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchao"))
    assert (done.code, done.stdout, done.stderr) == (0, f"aoconvert, version {__version__} ({others})\n", "")
    done = call()
    assert (done.code, done.stdout) == (2, "")
    assert "Usage: aoconvert" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuch"], "No such command 'nosuch'"),
        (["plan"], "Missing argument 'SOURCE'"),
        (["plan", "x", "--schme", "int8wo"], "No such option '--schme'"),
        (["plan", "x", "--scheme", "int8wo", "y"], "unexpected extra argument"),
    ],
)
def test_usage_errors(call: Call, arguments: list[str], said: str) -> None:
    done = call(*arguments)
    assert done.code == 2
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert said in error
    assert hint.startswith("hint: see aoconvert")
    assert done.stdout == ""


# --- the three modes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no scheme"),
        (["--scheme", "int8wo", "--min-sqnr", "30"], "--min-sqnr: these need --scheme auto"),
        (["--scheme", "int8wo", "--candidates", "int8wo"], "--candidates: these need --scheme auto"),
        (["--scheme", "auto"], "--scheme auto needs one goal"),
        (["--scheme", "auto", "--min-sqnr", "30", "--target-bits", "5"], "--scheme auto needs one goal"),
        (["--scheme", "auto", "--target-size", "much"], "'much' is not a size"),
        (["--scheme", "auto", "--target-bits", "-1"], "--target-bits must be a positive, finite number"),
        (["--scheme", "auto", "--min-sqnr", "30", "--group-size", "32"], "--scheme auto does not accept --group-size"),
        (["--scheme", "auto", "--min-sqnr", "30", "--candidates", "int8w"], "there is no scheme 'int8w'"),
    ],
)
def test_options_that_exclude_each_other(call: Call, llama: Path, arguments: list[str], said: str) -> None:
    done = call("plan", llama, *arguments)
    assert done.code == 2
    error, hint = done.stderr.splitlines()
    assert error.startswith(f"error: {said}")
    assert hint.startswith("hint: ")


def test_plan_json(call: Call, llama: Path, tmp_path: Path) -> None:
    options = ["--scheme", "int8wo", "--device", "cpu", "-o", tmp_path / "out", "--json"]
    done = call("plan", llama, *options)
    assert (done.code, done.stderr) == (0, "")
    made = json.loads(done.stdout)
    assert list(made) == [
        *("schema_version", "source", "components", "unquantized", "copied", "left_behind"),
        *("needs", "warnings", "problems"),
    ]
    assert made["problems"] == []
    assert made["source"]["label"] == "tiny-llama"
    assert str(llama.parent) not in done.stdout
    component = made["components"][0]
    keys = [
        "name",
        "library",
        "class",
        "scheme",
        "config",
        "layout",
        "tensors",
        "missing",
        "dropped",
        "files",
        "totals",
    ]
    assert list(component) == keys
    keys = ["name", "shape", "dtype", "action", "scheme", "reason", "bytes_in", "bytes_out", "device", "file"]
    assert all(list(tensor) == keys for tensor in component["tensors"])
    assert all(list(file) == ["path", "size"] for file in component["files"])
    assert set(made["needs"]) == {"disk_bytes", "device_peak_bytes", "host_peak_bytes"}
    dry = call("quantize", llama, *options, "--dry-run")
    assert dry.stdout == done.stdout
    assert not (tmp_path / "out").exists()


def test_plan_for_people(call: Call, llama: Path, tmp_path: Path) -> None:
    options = ["--scheme", "int8wo", "--device", "cpu", "-o", tmp_path / "out"]
    done = call("plan", llama, *options)
    assert (done.code, done.stderr) == (0, "")
    for part in ("LlamaForCausalLM", "int8wo", "pytorch_model.bin", "output head", "an embedding table"):
        assert part in done.stdout
    done = call("plan", llama, *options, "--tensors")
    (line,) = [line for line in done.stdout.splitlines() if "model.layers.1.mlp.down_proj.weight" in line]
    expected = "model.layers.1.mlp.down_proj.weight 64×160 bfloat16 quantize to int8wo 20.48 kB 10.56 kB"
    assert " ".join(line.split()) == expected
    done = call("plan", llama, *options, "-q")
    size = int(done.stdout)
    assert call("quantize", llama, *options, "-q").stdout == f"{tmp_path / 'out'}\n"
    assert (tmp_path / "out" / "pytorch_model.bin").stat().st_size == size


def test_quantize_json(call: Call, llama: Path, tmp_path: Path) -> None:
    done = call("quantize", llama, "--scheme", "int8wo", "--device", "cpu", "-o", tmp_path / "out", "--json")
    assert (done.code, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    keys = ["output", "manifest", "seconds", "bytes_in", "bytes_out", "parameters", "quantized_parameters"]
    keys += ["quantized_fraction", "peak_host_bytes", "peak_device_bytes", "skipped"]
    assert [key for key in result if key in keys] == keys
    assert Path(result["manifest"]).is_file()
    assert result["scheme"] == "int8wo"
    assert 30 < result["worst_sqnr_db"] < 60
    assert [item["class_name"] for item in result["components"]] == ["LlamaForCausalLM"]
    assert result["skipped"] == [{"name": "lm_head.weight", "reason": "output head"}]
    written = json.loads(Path(result["manifest"]).read_text())["components"][0]["totals"]
    for key in ("bytes_in", "bytes_out", "parameters", "quantized_parameters", "quantized_fraction"):
        assert result[key] == pytest.approx(written[key])


def test_quantize_for_people(call: Call, llama: Path, tmp_path: Path) -> None:
    done = call("quantize", llama, "--scheme", "int8wo", "--device", "cpu", "-o", tmp_path / "out")
    assert (done.code, done.stderr) == (0, "")  # not a terminal: no progress
    assert "LlamaForCausalLM" in done.stdout
    assert "worst SQNR" in done.stdout


def test_schemes(call: Call) -> None:
    rows = json.loads(call("schemes", "--json").stdout)
    assert [row["name"] for row in rows] == call("schemes", "-q").stdout.split()
    assert "int8wo" in call("schemes").stdout
    one = json.loads(call("schemes", "Int8WeightOnlyConfig", "--json").stdout)
    assert one in rows
    done = call("schemes", "nosuch", "--json")
    assert (done.code, done.stderr) == (2, "")
    assert json.loads(done.stdout)["error"]["type"] == "UnknownSchemeError"


def test_overwrite(call: Call, llama: Path, tmp_path: Path) -> None:
    options = ["--device", "cpu", "-o", tmp_path / "out"]
    assert call("quantize", llama, "--scheme", "int8wo", *options).code == 0
    before = (tmp_path / "out" / "pytorch_model.bin").read_bytes()
    assert call("quantize", llama, "--scheme", "float8wo", *options).code == 3
    assert (tmp_path / "out" / "pytorch_model.bin").read_bytes() == before
    assert call("quantize", llama, "--scheme", "float8wo", *options, "--overwrite").code == 0
    assert (tmp_path / "out" / "pytorch_model.bin").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- exit codes and tracebacks


def test_debug_shows_the_traceback(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("plan", tmp_path / "absent", "--scheme", "int8wo")
    quiet = call(*arguments)
    monkeypatch.setenv("AOCONVERT_DEBUG", "1")
    loud = call(*arguments)
    assert "Traceback" not in quiet.stderr
    assert loud.stderr.startswith("Traceback (most recent call last)")
    assert loud.stderr.endswith(quiet.stderr)
    assert loud.code == quiet.code == 3
    assert json.loads(call(*arguments, "--json").stdout)["error"]["exit_code"] == 3


def test_a_mistake_of_ours_is_one_line_too(
    call: Call, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be foreseen is said in one line, with what to do."""
    from aoconvert.planning import build

    monkeypatch.delattr(build, "choose_devices")
    done = call("plan", llama, "--scheme", "int8wo", "-o", tmp_path / "out")
    assert done.code == 1
    error, hint = done.stderr.splitlines()
    assert error == "error: unexpected NameError: name 'choose_devices' is not defined"
    assert "AOCONVERT_DEBUG=1" in hint


def test_streams_of_a_real_process(tmp_path: Path) -> None:
    done = run("plan", tmp_path / "absent", "--scheme", "int8wo")
    assert (done.returncode, done.stdout) == (3, "")
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
    done = run("plan", tmp_path / "absent", "--scheme", "int8wo", "--json")
    assert (done.returncode, done.stderr) == (3, "")
    assert json.loads(done.stdout)["error"]["exit_code"] == 3
    source = build_llama(tmp_path / "model")
    done = run("quantize", source, "--scheme", "int8wo", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert json.loads(done.stdout)["output"] == "out"


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/model-\xff")
    done = run("plan", name, "--scheme", "int8wo", "--json")
    assert (done.returncode, done.stderr) == (3, "")
    assert json.loads(done.stdout)["error"]["type"] == "SourceError"
    source = build_llama(tmp_path / "small")
    (tmp_path / os.fsdecode(b"out-\xff")).write_text("a file")
    done = run("quantize", source, "--scheme", "int8wo", "-o", tmp_path / os.fsdecode(b"out-\xff"), "--json")
    assert (done.returncode, done.stderr) == (3, "")
    assert "exists and is not a folder" in json.loads(done.stdout)["error"]["message"]
    done = run("schemes", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "int8wo" in done.stdout


@pytest.mark.parametrize("arguments", [["schemes"], ["schemes", "--json"], ["--help"]], ids=" ".join)
def test_reader_that_has_had_enough(arguments: list[str]) -> None:
    """``aoconvert … | head -1``, with a pipe whose reader is gone before the first byte."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "aoconvert", *arguments],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=False,
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode in (0, 1)
    assert done.returncode == 0 or arguments == ["--help"]  # click's own answer


def test_head_of_a_long_plan(forker: Forker, tmp_path: Path) -> None:
    """``aoconvert plan … | head -1``"""
    words = [
        "-m",
        "aoconvert",
        "plan",
        str(PUBLISHED / "black-forest-labs/FLUX.1-dev/transformer"),
        "--scheme",
        "int8wo",
        "--tensors",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with forker.popen(words, WITH_LIBRARIES, cwd=tmp_path, env=environment, **pipes) as plan:
        assert plan.stdout is not None
        assert plan.stderr is not None
        done = subprocess.run(["head", "-1"], stdin=plan.stdout, capture_output=True, text=True, check=True)
        plan.stdout.close()
        said = plan.stderr.read()
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == said == ""
