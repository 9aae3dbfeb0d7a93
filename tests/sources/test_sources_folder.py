import contextlib
import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoconvert.errors import SourceError, UsageError
from aoconvert.formats.safetensors.header import HeaderEntry, SafetensorsHeader, header_of
from aoconvert.options import HubOptions
from aoconvert.sources import folder as folder_module
from aoconvert.sources import resolve
from aoconvert.sources.base import is_safe_path
from aoconvert.sources.folder import FolderSource


def safetensors(tensors: dict[str, int], *, data: int | None = None) -> bytes:
    """A safetensors file of int8 vectors, with `data` bytes of data instead of as many as the header says."""
    offset, header = 0, {"__metadata__": {"format": "pt"}}
    for name, size in tensors.items():
        header[name] = {"dtype": "I8", "shape": [size], "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(offset if data is None else data)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    root = tmp_path / "my-model"
    (root / "transformer").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("secret")
    (root / "model_index.json").write_text('{"a": 1}')
    (root / "transformer" / "config.json").write_text('{\n "a": 1,\n oops\n}')
    (root / "transformer" / "model.safetensors").write_bytes(safetensors({"w": 8, "b": 2}))
    return root


def test_resolve_lists_and_names_a_folder(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(str(model))
    assert (source.kind, source.label, source.repo_id, source.revision) == ("folder", "my-model", None, None)
    assert list(source.files()) == ["model_index.json", "transformer/config.json", "transformer/model.safetensors"]
    entry = source.files()["model_index.json"]
    assert (entry.size, entry.sha256) == (8, None)
    assert source.read_json("model_index.json") == {"a": 1}
    assert str(model.parent) not in repr(source)
    monkeypatch.chdir(model / "transformer")
    assert resolve(".").label == "transformer"
    assert resolve("..").label == "my-model"
    monkeypatch.setenv("HOME", str(model.parent))
    assert resolve("~/my-model").label == "my-model"


def test_existing_folder_wins_over_repo_id(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert resolve("my-model/transformer").kind == "folder"
    with pytest.raises(UsageError, match="has no revision"):
        resolve("my-model", HubOptions(revision="main"))


@pytest.mark.parametrize("name", ["a.safetensors", "b.bin", "c.pt", "d.ckpt"])
def test_single_weights_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError, match="is a single weights file") as caught:
        resolve(str(tmp_path / name))
    assert caught.value.hint is not None
    assert "config.json" in caught.value.hint


def test_other_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(SourceError, match="is a file"):
        resolve(str(tmp_path / "a.txt"))


def test_bad_content_is_named(model: Path) -> None:
    source = FolderSource(model)
    (model / "latin1.json").write_bytes(b'{"a": "\xe9"}')
    (model / "deep.json").write_text("[" * 100_000)
    with pytest.raises(SourceError, match=r"^my-model: transformer/config.json is not valid JSON \(line 3\)$"):
        source.read_json("transformer/config.json")
    with pytest.raises(SourceError, match=r"latin1.json is not UTF-8 text \(byte 7\)"):
        source.read_json("latin1.json")
    with pytest.raises(SourceError, match=r"deep.json is not usable JSON"):
        source.read_json("deep.json")
    with pytest.raises(SourceError, match=r"^my-model has no file transformer/none.json$"):
        source.fetch(["model_index.json", "transformer/none.json"])


def test_file_removed_after_listing(model: Path) -> None:
    source = FolderSource(model)
    assert source.has("model_index.json")
    (model / "model_index.json").unlink()
    with pytest.raises(SourceError, match=r"model_index.json cannot be read: No such file"):
        source.read_bytes("model_index.json")


@given(st.text(st.sampled_from("ab/.\\:~\0\n "), max_size=12))
def test_no_path_leaves_the_root(path: str) -> None:
    if not is_safe_path(path):
        with pytest.raises(SourceError):
            FolderSource(Path("/nonexistent")).local(path)
        return
    root = "/root/of/source"
    assert os.path.normpath(f"{root}/{path}") == f"{root}/{path}"


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "a\\b", "C:/x", "a//b", "./a", "", "a\nb", "a/"])
def test_unsafe_paths(path: str) -> None:
    assert not is_safe_path(path)


def test_links(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    (model / "inside.json").symlink_to("model_index.json")
    (model / "out.json").symlink_to(tmp_path / "secret")
    (model / "broken.json").symlink_to("nowhere")
    (model / "vae").symlink_to(tmp_path / "elsewhere")
    source = FolderSource(model)
    assert source.read_json("inside.json") == {"a": 1}
    for path, message in [
        ("out.json", "out.json is a link that leaves the folder"),
        ("broken.json", "broken.json is a broken link"),
        ("vae/config.json", "vae is a link to a folder, which aoconvert does not follow"),
    ]:
        assert source.has(path)
        with pytest.raises(SourceError, match=message):
            source.local(path)
    assert "vae/config.json" not in source.files()
    assert not source.has("vae/none.json")


def test_hub_cache_snapshot_as_a_folder(tmp_path: Path) -> None:
    repo = tmp_path / "models--user--repo"
    snapshot = repo / "snapshots" / ("a" * 40)
    (snapshot / "transformer").mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs" / "etag").write_text("{}")
    (tmp_path / "blobs" / "ab").mkdir(parents=True)
    (tmp_path / "blobs" / "ab" / "shared").write_text("{}")
    (repo / "blobs" / "etag2").symlink_to("../../blobs/ab/shared")
    (tmp_path / "passwd").write_text("secret")
    (snapshot / "transformer" / "config.json").symlink_to("../../../blobs/etag")
    (snapshot / "transformer" / "shared.json").symlink_to("../../../blobs/etag2")
    (snapshot / "transformer" / "out.json").symlink_to("../../../../passwd")
    for source, prefix in [(FolderSource(snapshot), "transformer/"), (FolderSource(snapshot / "transformer"), "")]:
        assert source.read_json(f"{prefix}config.json") == {}
        assert source.read_json(f"{prefix}shared.json") == {}
        with pytest.raises(SourceError, match="leaves the folder"):
            source.local(f"{prefix}out.json")


def test_blobs_folder_of_nobody_is_outside(tmp_path: Path) -> None:
    root = tmp_path / "plain" / "snapshots" / "x"
    root.mkdir(parents=True)
    (tmp_path / "plain" / "blobs").mkdir()
    (tmp_path / "plain" / "blobs" / "b").write_text("{}")
    (root / "config.json").symlink_to("../../blobs/b")
    with pytest.raises(SourceError, match="leaves the folder"):
        FolderSource(root).local("config.json")


def test_home_folder_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "MAX_FILES", 2)
    with pytest.raises(SourceError, match="more than 2 files"):
        FolderSource(model).files()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_unreadable_folder(model: Path) -> None:
    (model / "transformer").chmod(0)
    try:
        with pytest.raises(SourceError, match="folder transformer cannot be read: Permission denied"):
            FolderSource(model).files()
    finally:
        (model / "transformer").chmod(0o755)


def test_header(model: Path) -> None:
    header = header_of(FolderSource(model), "transformer/model.safetensors")
    start = header.file_size - 10
    assert header.entries == {
        "w": HeaderEntry("I8", (8,), start, start + 8),
        "b": HeaderEntry("I8", (2,), start + 8, start + 10),
    }


def with_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated: a safetensors file has at least 8 bytes, this one has 0"),
        (b"1234567", "is truncated: a safetensors file has at least 8 bytes, this one has 7"),
        (struct.pack("<Q", 1 << 40), "is not a safetensors file: its header would be 1099511627776 bytes long"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "x.safetensors is a git-lfs pointer"),
        (with_header(b"{oops"), "its header is not valid JSON"),
        (with_header(b"\xff\xfe{}"), "its header is not valid JSON"),
        (with_header(b"[]"), "not a JSON object"),
        (with_header(b'{"w": 1}'), "tensor 'w': its header entry is not a JSON object"),
        (with_header(b'{"w": {"dtype": "I8", "shape": [1]}}'), "tensor 'w': its header entry has no data_offsets"),
        (
            with_header(b'{"w": {"dtype": "I8", "shape": [-1], "data_offsets": [0, 1]}}'),
            "'w': its shape is not a list",
        ),
        (
            with_header(b'{"w": {"dtype": "I8", "shape": [1], "data_offsets": [1, 0]}}'),
            "'w': I8 of shape .* takes 1 bytes",
        ),
        (
            with_header(b'{"w": {"dtype": "I8", "shape": [true], "data_offsets": [0, 0]}}'),
            "'w': its shape is not a list",
        ),
        (safetensors({"w": 8, "b": 2}, data=9), r"is truncated: the header promises \d+ bytes, the file has \d+"),
    ],
)
def test_damaged_header(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        header_of(FolderSource(tmp_path), "x.safetensors")
    assert "x.safetensors" in caught.value.message
    assert "\n" not in caught.value.message


@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_a_source_error_or_a_header(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, framed: bool
) -> None:
    root = tmp_path_factory.mktemp("x", numbered=True)
    (root / "x.safetensors").write_bytes(with_header(raw) if framed else raw)
    with contextlib.suppress(SourceError):
        assert isinstance(header_of(FolderSource(root), "x.safetensors"), SafetensorsHeader)


def test_absurd_header_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 200_000_000))
        stream.truncate(300_000_000)  # sparse
    with pytest.raises(SourceError, match="header would be 200000000 bytes long"):
        header_of(FolderSource(tmp_path), "x.safetensors")


def test_real_safetensors_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"a.weight": torch.zeros(3, 4, dtype=torch.bfloat16), "scalar": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = header_of(FolderSource(tmp_path), "x.safetensors")
    assert {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()} == {
        "a.weight": ("BF16", (3, 4)),
        "scalar": ("F32", ()),
    }
