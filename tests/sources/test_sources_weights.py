import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aoconvert.errors import SourceError
from aoconvert.sources.folder import FolderSource
from aoconvert.sources.weights import Library, WeightFiles, find_weights

D = "diffusion_pytorch_model"


def make(root: Path, files: list[str], index: dict[str, dict[str, str]] | None = None) -> FolderSource:
    root.mkdir(exist_ok=True)
    for path in files:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    for path, weight_map in (index or {}).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return FolderSource(root)


@pytest.mark.parametrize(
    ("library", "variant", "name", "format_"),
    [
        ("diffusers", None, f"{D}.safetensors", "safetensors"),
        ("diffusers", "fp16", f"{D}.fp16.safetensors", "safetensors"),
        ("diffusers", None, f"{D}.bin", "bin"),
        ("diffusers", "fp16", f"{D}.fp16.bin", "bin"),
        ("transformers", None, "model.safetensors", "safetensors"),
        ("transformers", "fp16", "model.fp16.safetensors", "safetensors"),
        ("transformers", None, "pytorch_model.bin", "bin"),
        ("transformers", "bf16", "pytorch_model.bf16.bin", "bin"),
    ],
)
@pytest.mark.parametrize("folder", ["", "transformer"])
def test_single(tmp_path: Path, library: Library, variant: str | None, name: str, format_: str, folder: str) -> None:
    path = f"{folder}/{name}".lstrip("/")
    source = make(tmp_path, [path, f"other/{name}"])
    found = find_weights(source, folder, library, variant=variant)
    assert found == WeightFiles(format_, (path,), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("library", "variant", "index", "shards", "format_"),
    [
        ("diffusers", None, f"{D}.safetensors.index.json", f"{D}-0000{{}}-of-00002.safetensors", "safetensors"),
        (
            "diffusers",
            "fp16",
            f"{D}.safetensors.index.fp16.json",
            f"{D}.fp16-0000{{}}-of-00002.safetensors",
            "safetensors",
        ),
        # diffusers before 0.31
        (
            "diffusers",
            "fp16",
            f"{D}.safetensors.fp16.index.json",
            f"{D}-0000{{}}-of-00002.fp16.safetensors",
            "safetensors",
        ),
        ("diffusers", None, f"{D}.bin.index.json", f"{D}-0000{{}}-of-00002.bin", "bin"),
        ("transformers", None, "model.safetensors.index.json", "model-0000{}-of-00002.safetensors", "safetensors"),
        (
            "transformers",
            "fp16",
            "model.safetensors.index.fp16.json",
            "model.fp16-0000{}-of-00002.safetensors",
            "safetensors",
        ),
        ("transformers", None, "pytorch_model.bin.index.json", "pytorch_model-0000{}-of-00002.bin", "bin"),
    ],
)
def test_sharded(tmp_path: Path, library: Library, variant: str | None, index: str, shards: str, format_: str) -> None:
    one, two = shards.format(1), shards.format(2)
    source = make(tmp_path, [f"te/{one}", f"te/{two}"], {f"te/{index}": {"b": two, "a": one, "c": two}})
    assert find_weights(source, "te/", library, variant=variant) == WeightFiles(
        format_,  # type: ignore[arg-type]
        (f"te/{one}", f"te/{two}"),
        {"b": f"te/{two}", "a": f"te/{one}", "c": f"te/{two}"},
        f"te/{index}",
    )
    if variant is not None:
        with pytest.raises(SourceError, match=r"source/te holds its weights only as variants: fp16") as caught:
            find_weights(make(tmp_path / "source", [f"te/{one}"], {f"te/{index}": {}}), "te", library)
        assert caught.value.hint == "choose one: --variant fp16"


def test_safetensors_before_bin(tmp_path: Path) -> None:
    source = make(
        tmp_path, ["pytorch_model.bin", "m.safetensors"], {"model.safetensors.index.json": {"a": "m.safetensors"}}
    )
    found = find_weights(source, "", "transformers")
    assert found is not None
    assert (found.format, found.files) == ("safetensors", ("m.safetensors",))


def test_one_shard_of_another_count_is_fine(tmp_path: Path) -> None:
    shard = "model-00001-of-00009.safetensors"
    found = find_weights(make(tmp_path, [shard], {"model.safetensors.index.json": {"a": shard}}), "", "transformers")
    assert found is not None
    assert found.files == (shard,)


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_no_weights(tmp_path: Path, library: Library, variant: str | None) -> None:
    source = make(tmp_path, ["config.json", "tf_model.h5", "model.onnx", "sub/model.safetensors"])
    assert find_weights(source, "", library, variant=variant) is None
    assert find_weights(source, "absent", library, variant=variant) is None


def test_absent_variant_lists_what_is_there(tmp_path: Path) -> None:
    source = make(tmp_path, ["t/model.fp16.safetensors", "t/model.ema-00001-of-00002.safetensors"])
    with pytest.raises(SourceError, match=r"/t has no variant 'bf16'; there are weights for: ema, fp16$") as caught:
        find_weights(source, "t", "transformers", variant="bf16")
    assert caught.value.hint == "choose one: --variant ema"
    source = make(tmp_path / "plain", ["model.safetensors", "pytorch_model.fp16.bin"])
    with pytest.raises(SourceError, match=r"has no variant 'bf16'; there are weights for: no variant, fp16$") as caught:
        find_weights(source, "", "transformers", variant="bf16")
    assert caught.value.hint == "omit --variant"


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_without_an_index(tmp_path: Path, variant: str | None) -> None:
    dotted = "" if variant is None else ".fp16"
    source = make(tmp_path, [f"{D}{dotted}-00001-of-00002.safetensors"])
    with pytest.raises(SourceError, match="has shards of the weights but no index"):
        find_weights(source, "", "diffusers", variant=variant)


INDEX = "t/model.safetensors.index.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{oops", r"t/model.safetensors.index.json is not valid JSON \(line 1\)"),
        ("[]", "index.json has no weight_map"),
        ('{"metadata": {}}', "index.json has no weight_map"),
        ('{"weight_map": []}', "index.json has no weight_map"),
        ('{"weight_map": {}}', "names no tensor"),
        ('{"weight_map": {"a": 1}}', "the shard of tensor 'a' is not a file name"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"index.json: shard 'gone.safetensors' does not exist"),
        ('{"weight_map": {"a": "here.bin"}}', "shard 'here.bin' is not a .safetensors file"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', r"shard '../../etc/passwd' is outside the folder"),
        ('{"weight_map": {"a": "../top.safetensors"}}', r"shard '../top.safetensors' is outside the folder"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "is outside the folder"),
        ('{"weight_map": {"a": "x\\\\..\\\\y.safetensors"}}', "is outside the folder"),
        ('{"weight_map": {"a": "C:/y.safetensors"}}', "is outside the folder"),
        ('{"weight_map": {"a": "link.safetensors"}}', r"t/link.safetensors is a link that leaves the folder"),
        ('{"weight_map": {"a": "broken.safetensors"}}', r"t/broken.safetensors is a broken link"),
    ],
)
def test_bad_index(tmp_path: Path, content: str, message: str) -> None:
    root = tmp_path / "source"
    make(root, ["t/here.bin", "top.safetensors"])
    (tmp_path / "outside.safetensors").write_bytes(b"x")
    (root / "t" / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (root / "t" / "broken.safetensors").symlink_to("nowhere")
    (root / INDEX).write_text(content)
    with pytest.raises(SourceError, match=message) as caught:
        find_weights(FolderSource(root), "t", "transformers")
    assert "source" in caught.value.message
    assert "\n" not in caught.value.message


def test_single_file_that_is_a_link_out(tmp_path: Path) -> None:
    source = make(tmp_path / "source", [])
    (tmp_path / "x").write_bytes(b"x")
    (tmp_path / "source" / "model.safetensors").symlink_to(tmp_path / "x")
    with pytest.raises(SourceError, match="link that leaves the folder"):
        find_weights(source, "", "transformers")


def test_folder_outside(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not a folder inside the source"):
        find_weights(make(tmp_path / "source", []), "../x", "transformers")


parts = st.sampled_from(["..", ".", "", "a", "t", "s", "~", "C:", "..\\", "%2e%2e", "\x00", "\n"])
shards = st.builds(
    lambda lead, middle, tail: lead + "/".join(middle) + tail,
    st.sampled_from(["", "/", "\\", "./", "../", "//", "file://"]),
    st.lists(parts, max_size=5),
    st.sampled_from([".safetensors", "/x.safetensors", "x.safetensors", ""]),
) | st.text(max_size=20)


@given(shards)
@example("../../outside/x.safetensors")
@example("a/../../x.safetensors")
@example("sub/x.safetensors")
def test_nothing_outside_the_folder_is_accepted(tmp_path_factory: pytest.TempPathFactory, shard: str) -> None:
    """With files of the right name all around the folder, only those below it pass."""
    root = tmp_path_factory.getbasetemp() / "around" / "outer" / "source"
    if not root.exists():
        root.parent.mkdir(parents=True)
        for place in (root / "t" / "sub", root / "t" / "a", root / "t", root, root.parent, root.parent.parent):
            place.mkdir(exist_ok=True, parents=True)
            (place / "x.safetensors").write_bytes(b"x")
    (root / INDEX).write_text(json.dumps({"weight_map": {"w": shard}}))
    try:
        found = find_weights(FolderSource(root), "t", "transformers")
    except SourceError as error:
        assert "\n" not in error.message
        return
    assert found is not None
    for path in found.files:
        assert (root / path).resolve().is_relative_to((root / "t").resolve())
        assert path in {"t/x.safetensors", "t/sub/x.safetensors", "t/a/x.safetensors"}
