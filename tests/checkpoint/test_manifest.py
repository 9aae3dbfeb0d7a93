import getpass
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import pytest
from helpers.checkpoints import build_llama
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import aoconvert
from aoconvert.checkpoint import manifest
from aoconvert.checkpoint.manifest import FileEntry, Manifest
from aoconvert.errors import SourceError

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / manifest.SCHEMA_PATH
TOKEN = "hf_secretSECRETsecretSECRETsecret0000"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same conversion twice, from different places, with a token."""
    found = []
    for number in range(2):
        place = tmp_path_factory.mktemp(f"somewhere-private-{number}")
        source = build_llama(place / "tiny-llama")
        (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A card\n")
        (source / "tokenizer.json").write_text("{}")
        aoconvert.quantize(
            source.absolute(), "int8wo", output=(place / "out").absolute(), token=TOKEN, device="cpu", skip=["lm_head"]
        )
        found.append(place / "out")
    return found[0], found[1]


@pytest.fixture
def edited(outputs: tuple[Path, Path], tmp_path: Path) -> Callable[[Callable[[Any], None]], Path]:
    """A folder with a changed copy of the manifest."""

    def edit(change: Callable[[Any], None]) -> Path:
        values = json.loads((outputs[0] / "aoconvert.json").read_text())
        change(values)
        (tmp_path / "aoconvert.json").write_text(json.dumps(values))
        return tmp_path

    return edit


def test_the_published_schema_is_the_models_own() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == manifest.json_schema(), "run: python -m aoconvert.checkpoint.manifest"
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA.read_text()))


def test_a_real_manifest_is_valid(outputs: tuple[Path, Path]) -> None:
    values = json.loads((outputs[0] / "aoconvert.json").read_text())
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    assert list(validator.iter_errors(values)) == []
    del values["components"][0]["tensors"][0]["action"]
    values["copied"][0]["sha256"] = "no digest"
    assert len(list(validator.iter_errors(values))) == 2


def test_it_says_what_is_in_the_folder(outputs: tuple[Path, Path]) -> None:
    written = manifest.load(outputs[0])
    for entry in [*written.components[0].files, *written.copied]:
        content = (outputs[0] / entry.path).read_bytes()
        assert (entry.size, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest()), entry.path
    source = outputs[0].parent / "tiny-llama" / "model.safetensors"
    assert [file.sha256 for file in written.source.files] == [hashlib.sha256(source.read_bytes()).hexdigest()]
    assert written.source.license == "apache-2.0"
    device = written.environment.device.type  # another kind may make other bytes
    assert written.run.command == f"aoconvert quantize tiny-llama --scheme int8wo --skip lm_head --device {device}"


def test_dump_and_load(outputs: tuple[Path, Path]) -> None:
    text = (outputs[0] / "aoconvert.json").read_text(encoding="utf-8")
    assert manifest.dump(manifest.load(outputs[0])) == text


def test_unknown_keys_are_kept(edited: Callable[[Callable[[Any], None]], Path]) -> None:
    def change(values: Any) -> None:
        values["later"] = {"a": [1, 2]}
        values["components"][0]["tensors"][0]["later"] = "x"
        values["run"]["later"] = None
        values["run"]["digest"] = None  # a newer writer takes it over its own keys too

    again = json.loads(manifest.dump(manifest.load(edited(change))))
    assert again["later"] == {"a": [1, 2]}
    assert again["components"][0]["tensors"][0]["later"] == "x"
    assert "later" in again["run"]


def test_unknown_keys_of_a_tensor_are_its_own(edited: Callable[[Callable[[Any], None]], Path]) -> None:
    """Whatever they are called, and through every way of writing."""
    later = {"unknown": 1, "__class__": "x", "__dict__": {"name": "y"}, "to_dict": None, "é": [{"a": 2.5}], "": 0}

    def change(values: Any) -> None:
        values["components"][0]["tensors"][0] |= later
        values["run"]["digest"] = None

    folder = edited(change)
    found = manifest.load(folder)
    entry = found.components[0].tensors[0]
    assert entry.unknown == later
    assert entry.to_dict()["name"] == entry.name != "y"
    for written in (manifest.dump(found), found.model_dump_json()):
        [first, *rest] = json.loads(written)["components"][0]["tensors"]
        assert {key: first[key] for key in later} == later
        assert not any(later.keys() & other.keys() for other in rest)
    assert Manifest.model_validate(json.loads(manifest.dump(found))).components == found.components


def test_a_wrong_tensor_is_named_by_its_place(edited: Callable[[Callable[[Any], None]], Path]) -> None:
    def change(values: Any) -> None:
        for at in (3, 7):
            values["components"][0]["tensors"][at]["sha256"] = "no digest"

    with pytest.raises(SourceError, match=r"valid manifest: components\.0\.tensors\.3\.sha256: String should"):
        manifest.load(edited(change))


def enlarge(folder: Path, count: int) -> int:
    """The manifest with the experts of as many tensors as a large model has. How many bytes it has then."""
    values = json.loads((folder / "aoconvert.json").read_text())
    tensors = values["components"][0]["tensors"]
    pattern = next(tensor for tensor in tensors if tensor["action"] == "quantize")
    for at in range(count):
        name = f"model.layers.{at // 1536}.mlp.experts.{at // 3 % 512}.{('gate', 'up', 'down')[at % 3]}_proj.weight"
        digest = hashlib.sha256(name.encode()).hexdigest()
        tensors.append(
            {**pattern, "name": name, "sqnr_db": 40 + at / count, "max_abs_error": at / count, "sha256": digest}
        )
    values["run"]["digest"] = None
    return (folder / "aoconvert.json").write_text(json.dumps(values, indent=1))


def test_what_a_tensor_takes(edited: Callable[[Callable[[Any], None]], Path]) -> None:
    """In memory, bytes for each: held, and on the way there and back beside the text."""
    folder, count = edited(lambda values: None), 5_000
    size = enlarge(folder, count)
    tracemalloc.start()
    try:
        found = manifest.load(folder)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        text = manifest.encode(found)
        written = tracemalloc.get_traced_memory()[1] - held
    finally:
        tracemalloc.stop()
    assert (
        json.loads(text)["components"][0]["tensors"]
        == json.loads((folder / "aoconvert.json").read_text())["components"][0]["tensors"]
    )
    assert held < 550 * count  # a pydantic model takes 2,300
    assert peak < size + held + (6 << 20)
    assert written < 1.2 * len(text) + (2 << 20)


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", ["card", "push", "verify", "inspect", "quantize", "recipe", "written"])
def test_commands_with_300_000_tensors_stay_below_a_gigabyte(
    command: str, outputs: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(outputs[0], folder)
    assert enlarge(folder, 300_000) > 180_000_000
    source, recipe = str(outputs[0].parent / "tiny-llama"), str(folder / "aoconvert.json")
    arguments = {
        "card": ["card", str(folder), "--write"],
        "push": ["push", "me/model", str(folder), "--dry-run", "--allow-unverified"],
        "verify": ["verify", str(folder)],  # it fails: the tensors are not there
        "inspect": ["inspect", str(folder)],
        "quantize": ["quantize", source, "--scheme", "int8wo", "-o", str(folder), "--overwrite"],
        "recipe": ["quantize", source, "--recipe", recipe, "-o", str(tmp_path / "again")],
    }
    run = "import sys\nfrom aoconvert.cli.main import main\nsys.argv = ['aoconvert', *arguments]\nmain()\n"
    write = "from aoconvert.checkpoint import manifest\nmanifest.encode(manifest.load(Path(folder)))\n"
    code = (
        "import atexit\nfrom pathlib import Path\n"
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        f"    Path({str(tmp_path / 'peak')!r}).write_text(next(line.split()[1] for line in lines if 'VmHWM' in line))\n"
        f"atexit.register(peak)\nfolder, arguments = {str(folder)!r}, {arguments.get(command)!r}\n"
    ) + (write if command == "written" else run)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == (4 if command == "verify" else 0), done.stderr
    assert int((tmp_path / "peak").read_text()) * 1024 < 1_000_000_000


def test_the_digest_covers_unknown_keys(edited: Callable[[Callable[[Any], None]], Path]) -> None:
    with pytest.raises(SourceError, match="edited or damaged"):
        manifest.load(edited(lambda values: values.update(later=1)))


@pytest.mark.parametrize("bit", range(7))
@pytest.mark.parametrize("at", range(len("digest")))
def test_damage_of_the_digest_s_own_name(at: int, bit: int, outputs: tuple[Path, Path], tmp_path: Path) -> None:
    raw = bytearray((outputs[0] / "aoconvert.json").read_bytes())
    raw[raw.rindex(b'"digest"') + 1 + at] ^= 1 << bit
    (tmp_path / "aoconvert.json").write_bytes(raw)
    with pytest.raises(SourceError, match=r"edited or damaged|cannot be read"):
        manifest.load(tmp_path)


@pytest.mark.parametrize("version", [2, 0, "1", None, 1.5])
def test_another_schema_version_is_refused(version: Any, edited: Callable[[Callable[[Any], None]], Path]) -> None:
    folder = edited(lambda values: values.update(schema_version=version))
    with pytest.raises(SourceError, match="schema_version") as caught:
        manifest.load(folder)
    assert caught.value.hint == "upgrade aoconvert"


BAD_PATHS = ["../x", "/etc/passwd", "a/../../x", "..", "", "C:/x", "c:x", "a\\..\\x", "\\\\host\\x", "a\0b"]


@pytest.mark.parametrize("path", BAD_PATHS)
@pytest.mark.parametrize("where", ["files", "copied", "source", "tensor", "folder"])
def test_paths_out_of_the_folder_are_refused(
    path: str, where: str, edited: Callable[[Callable[[Any], None]], Path]
) -> None:
    def change(values: Any) -> None:
        component = values["components"][0]
        if where == "tensor":
            component["tensors"][0]["file"] = path
        elif where == "folder":
            component["path"] = path or ".."
        else:
            entries = {"files": component["files"], "copied": values["copied"], "source": values["source"]["files"]}
            entries[where][0]["path"] = path

    with pytest.raises(SourceError, match="is not a valid manifest"):
        manifest.load(edited(change))


@given(st.lists(st.sampled_from(["..", ".", "a", "", "b c", "C:", "\\", "é", "..."]), min_size=1, max_size=6))
def test_an_accepted_path_stays_inside(parts: list[str]) -> None:
    path = "/".join(parts)
    try:
        entry = FileEntry(path=path, size=1, sha256="0" * 64)
    except ValidationError:
        assert not path or path.startswith(("/", "C:")) or "\\" in path or ".." in parts
        return
    assert ".." not in PurePosixPath(entry.path).parts
    assert (Path("/root/folder") / entry.path).resolve().is_relative_to("/root/folder")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "cannot be read: not valid JSON"),
        (b"{", "cannot be read: not valid JSON"),
        (b"\xff\xfe", "cannot be read: not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"schema_version": NaN}', r"not valid JSON \(NaN\)"),
        (b'{"schema_version": ' + b"9" * 5000 + b"}", "a number of 5,000 digits"),
        (b"[]", "schema_version None"),
        (b'{"schema_version": 1}', "is not a valid manifest: tool: Field required"),
    ],
)
def test_damaged_manifests(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "aoconvert.json").write_bytes(content)
    with pytest.raises(SourceError, match=what) as caught:
        manifest.load(tmp_path)
    assert "\n" not in caught.value.message


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no aoconvert.json") as caught:
        manifest.load(tmp_path)
    assert caught.value.hint
    (tmp_path / "aoconvert.json").mkdir()
    with pytest.raises(SourceError, match="cannot be read: is not a regular file"):
        manifest.load(tmp_path)


def test_nothing_private_is_written(outputs: tuple[Path, Path]) -> None:
    written = manifest.load(outputs[0])
    kernel = Path("/proc/sys/kernel/hostname")
    hosts = {socket.gethostname(), kernel.read_text().strip() if kernel.is_file() else socket.gethostname()}
    private = [TOKEN, "hf_", "somewhere-private", str(Path.home()) + "/", str(outputs[0].parent), "/tmp/", str(ROOT)]
    # a host or user that is called like a word of the format would be found everywhere
    private += [name for name in hosts if len(name) > 4 and name != "localhost"]
    private += [getpass.getuser()] if getpass.getuser() != "root" else []
    for file in outputs[0].rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        for secret in private:
            assert secret.encode() not in content, f"{secret} in {file.name}"

    def strings(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [found for item in value.items() for part in item for found in strings(part)]
        if isinstance(value, list):
            return [found for item in value for found in strings(item)]
        return [value] if isinstance(value, str) else []

    for text in strings(json.loads(manifest.dump(written))):
        assert not text.startswith(("/", "~")), text


def test_two_runs_differ_only_in_run(outputs: tuple[Path, Path]) -> None:
    def values(folder: Path) -> Any:
        return Manifest.model_validate(json.loads((folder / "aoconvert.json").read_text())).model_dump(exclude={"run"})

    first, second = outputs
    assert values(first) == values(second)
    names = sorted(path.relative_to(first).as_posix() for path in first.rglob("*"))
    assert names == sorted(path.relative_to(second).as_posix() for path in second.rglob("*"))
    for name in names:
        if name != "aoconvert.json":
            assert (first / name).read_bytes() == (second / name).read_bytes(), name
