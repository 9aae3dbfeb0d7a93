"""HubSource against the loopback Hub, with the released Hub client, each script in a process of its own."""

import hashlib
import json
import re
import shutil
import struct
from pathlib import Path

import pytest
from fake_hub.fixtures import HubClient
from fake_hub.server import Fault, total_bytes

TOKEN = "hf_" + "sEcReT" * 5


def safetensors(size: int, tensors: int = 1) -> bytes:
    """A safetensors file of int8 vectors with `size` bytes of data in all."""
    step = size // tensors
    header = {
        f"layer.{n}.weight": {"dtype": "I8", "shape": [step], "data_offsets": [n * step, (n + 1) * step]}
        for n in range(tensors)
    }
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(step * tensors)


PIPELINE: dict[str, bytes | Path] = {
    ".gitattributes": b"*.safetensors filter=lfs",
    "LICENSE": b"Apache",
    "README.md": b"---\nlicense: apache-2.0\n---\n",
    "model_index.json": b'{"_class_name": "X"}',
    "modeling_x.py": b"raise SystemExit",
    "sample.png": b"png",
    "tokenizer/spiece.model": b"sp",
    "tokenizer/odd[1]name*.json": b"{}",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": safetensors(1000),
    "vae/diffusion_pytorch_model.safetensors": safetensors(500),
}
SMALL = {
    "LICENSE", "README.md", "model_index.json", "tokenizer/spiece.model", "tokenizer/odd[1]name*.json",
    "transformer/config.json",
}  # fmt: skip
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def publish(client: HubClient, repo_id: str = "user/model", files: dict[str, bytes | Path] = PIPELINE) -> str:
    client.hub.state.create_repo(repo_id)
    return client.hub.state.commit(repo_id, files)


def cached(client: HubClient) -> set[str]:
    """Paths in the cache's snapshot folders."""
    snapshots = client.home.glob("hub/models--*/snapshots/*")
    return {file.relative_to(root).as_posix() for root in snapshots for file in root.rglob("*") if file.is_file()}


def test_pins_lists_and_fetches_only_small_files(hub_client: HubClient) -> None:
    sha = publish(hub_client)
    result = hub_client.run(
        "s = resolve('user/model')\n"
        "result = [s.kind, s.label, s.repo_id, s.revision, repr(s), s.read_json('model_index.json'),\n"
        "          {p: [f.size, f.sha256] for p, f in s.files().items()}]"
    )
    kind, label, repo_id, revision, shown, index, files = result
    assert (kind, label, repo_id, revision) == ("hub", "user/model", "user/model", sha)
    assert shown == f"HubSource('user/model', revision='{sha}')"
    assert index == {"_class_name": "X"}
    assert list(files) == sorted(PIPELINE)
    content = PIPELINE[WEIGHTS]
    assert isinstance(content, bytes)
    assert files[WEIGHTS] == [len(content), hashlib.sha256(content).hexdigest()]
    assert files["LICENSE"] == [6, None]
    assert cached(hub_client) == SMALL
    assert not hub_client.hub.requests(r"safetensors$|\.py$|png$|gitattributes")
    assert hub_client.stderr == ""


def test_every_download_names_the_commit_though_the_branch_moves(hub_client: HubClient) -> None:
    first = publish(hub_client)
    state = hub_client.hub.state
    second = state.commit("user/model", {"transformer/config.json": b'{"new": 1}', WEIGHTS: safetensors(2000)})
    state.set_ref("user/model", "main", first)
    # The branch moves between the pin and the fetch: the script itself moves it.
    script = (
        "s = resolve('user/model')\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from pathlib import Path\n"
        "from fake_hub.state import HubState\n"
        f"HubState(Path({str(state.root)!r})).set_ref('user/model', 'main', {second!r})\n"
        f"s.fetch(['{WEIGHTS}'])\n"
        f"result = [s.revision, s.local('{WEIGHTS}').stat().st_size, resolve('user/model').revision]"
    )
    revision, size, later = hub_client.run(script)
    content = PIPELINE[WEIGHTS]
    assert isinstance(content, bytes)
    assert (revision, size, later) == (first, len(content), second)
    # Only the two pins ask for the branch; the listings and files are asked for by commit.
    assert len(hub_client.hub.requests("^/api/models/user/model$")) == 2
    named = {
        match[1]
        for entry in hub_client.hub.log
        if (match := re.search("/(?:resolve|revision|tree)/([^/]+)", entry.path))
    }
    assert named <= {first, second}


def test_revisions(hub_client: HubClient) -> None:
    main = publish(hub_client)
    state = hub_client.hub.state
    state.set_ref("user/model", "refs/pr/1", main)
    dev = state.commit("user/model", {"config.json": b"{}"}, ref="refs/pr/1")
    state.set_ref("user/model", "v1", main)
    result = hub_client.run(
        "import os\n"
        "names = ['user/model', 'user/model@v1', 'hf://user/model@refs/pr/1', 'user/model@refs/pr/1',\n"
        f"         'user/model@{dev}', os.environ['HF_ENDPOINT'] + '/user/model/tree/v1']\n"
        "result = [resolve(n).revision for n in names]\n"
        "result += [resolve('user/model', HubOptions(revision='refs/pr/1')).revision,\n"
        "          resolve('user/model@v1', HubOptions(revision='v1')).revision,\n"
        "          attempt(lambda: resolve('user/model@v1', HubOptions(revision='v2')))]"
    )
    assert result[:-1] == [main, main, dev, dev, dev, main, dev, main]
    assert (result[-1]["error"], result[-1]["exit_code"]) == ("UsageError", 2)
    assert result[-1]["message"].startswith("two revisions are given: 'v1' in 'user/model@v1', and 'v2'")


def test_remote_code_only_on_request(hub_client: HubClient) -> None:
    publish(hub_client)
    hub_client.run("resolve('user/model', trust_remote_code=True)")
    assert cached(hub_client) == SMALL | {"modeling_x.py"}


def test_fetch_only_what_is_asked_for(hub_client: HubClient) -> None:
    publish(hub_client)
    result = hub_client.run(
        "s = resolve('user/model')\n"
        "seen = []\n"
        "before = attempt(lambda: str(s.local('sample.png')))\n"
        f"s.fetch(['{WEIGHTS}', 'sample.png', '{WEIGHTS}'], lambda *a: seen.append(a))\n"
        f"result = [before, seen, s.local('{WEIGHTS}').read_bytes().hex(), entries(s, '{WEIGHTS}'),\n"
        "          attempt(lambda: s.fetch(['no.json'])), attempt(lambda: s.fetch(['../x']))]"
    )
    before, seen, content, header, absent, outside = result
    assert before["message"] == "user/model: sample.png has not been fetched"
    expected = PIPELINE[WEIGHTS]
    assert isinstance(expected, bytes)
    assert bytes.fromhex(content) == expected
    start = len(expected) - 1000
    assert header == {"layer.0.weight": ["I8", [1000], start, start + 1000]}
    total = len(expected) + 3
    assert seen[-1] == [total, total]
    done = [step[0] for step in seen]
    assert done == sorted(done)
    assert {step[1] for step in seen} == {total}
    assert cached(hub_client) == SMALL | {WEIGHTS, "sample.png"}
    assert (absent["error"], absent["message"]) == ("SourceError", "user/model has no file no.json")
    assert (outside["error"], outside["exit_code"]) == ("SourceError", 3)
    assert hub_client.stderr == ""


def test_pattern_characters_fetch_nothing_else(hub_client: HubClient) -> None:
    publish(hub_client, files={"config.json": b"{}", "a*.bin": b"1", "ab.bin": b"2", "[x].bin": b"3", "x.bin": b"4"})
    hub_client.run("s = resolve('user/model'); s.fetch(['a*.bin', '[x].bin'])")
    assert cached(hub_client) == {"config.json", "a*.bin", "[x].bin"}


def test_headers_fetch_no_weights(hub_client: HubClient) -> None:
    """A plan of a 20 MB file costs one request of 64 KiB."""
    content = safetensors(20_000_000, 40)
    start = len(content) - 20_000_000
    publish(hub_client, files={"config.json": b"{}", "model.safetensors": content})
    header = hub_client.run(
        "s = resolve('user/model')\nfiles = find_weights(s, '', 'transformers').files\nresult = entries(s, files[0])"
    )
    assert len(header) == 40
    assert header["layer.39.weight"] == ["I8", [500_000], start + 19_500_000, start + 20_000_000]
    assert total_bytes(hub_client.hub.requests("", server="store")) == 1 << 16
    assert total_bytes(hub_client.hub.log) < 110_000
    assert "model.safetensors" not in cached(hub_client)


def test_long_header_needs_one_more_request(hub_client: HubClient) -> None:
    content = safetensors(20_000_000, 4000)
    length = int.from_bytes(content[:8], "little")
    publish(hub_client, files={"config.json": b"{}", "model.safetensors": content})
    names = hub_client.run("result = list(entries(resolve('user/model'), 'model.safetensors'))")
    assert names == [f"layer.{n}.weight" for n in range(4000)]
    requests = hub_client.hub.requests("", server="store")
    assert len(requests) == 2
    assert total_bytes(requests) == -(-(8 + length) // (1 << 16)) * (1 << 16)  # whole blocks of 64 KiB


def with_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def test_damaged_headers_on_the_hub(hub_client: HubClient) -> None:
    bad = {
        "short.safetensors": b"123",
        "html.safetensors": b"<html><body>not here</body></html>",
        "json.safetensors": with_header(b"{oops"),
        "list.safetensors": with_header(b"[]"),
        "entry.safetensors": with_header(b'{"w": 1}'),
        "keys.safetensors": with_header(b'{"w": {"dtype": "I8"}}'),
        "shape.safetensors": with_header(b'{"w": {"dtype": "I8", "shape": 3, "data_offsets": [0, 1]}}'),
        "cut.safetensors": safetensors(1000)[:-1000],
    }
    publish(hub_client, files={"config.json": b"{}", **bad})
    result = hub_client.run(
        f"s = resolve('user/model'); result = {{n: attempt(lambda: entries(s, n)) for n in {list(bad)!r}}}"
    )
    for name, outcome in result.items():
        assert outcome["error"] == "SourceError", (name, outcome)
        assert outcome["message"].startswith(f"user/model: {name}"), outcome
    assert "is truncated: the header promises" in result["cut.safetensors"]["message"]


def test_weights_of_a_pipeline_and_a_sharded_model(hub_client: HubClient) -> None:
    index = {"weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}}
    shards: dict[str, bytes | Path] = {f"te/model-0000{n}-of-00002.safetensors": safetensors(10) for n in (1, 2)}
    bad = {"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}}
    publish(
        hub_client,
        files={
            **PIPELINE,
            **shards,
            "te/model.safetensors.index.json": json.dumps(index).encode(),
            "bad/model.safetensors.index.json": json.dumps(bad).encode(),
        },
    )
    one, te, none, refused = hub_client.run(
        "s = resolve('user/model')\n"
        "show = lambda f: [f.format, f.paths, f.index]\n"
        "result = [show(find_weights(s, 'transformer', 'diffusers')), show(find_weights(s, 'te', 'transformers')),\n"
        "          find_weights(s, 'tokenizer', 'transformers'),\n"
        "          attempt(lambda: find_weights(s, 'bad', 'transformers'))]"
    )
    assert one == ["safetensors", [WEIGHTS], None]
    paths = [*sorted(shards), "te/model.safetensors.index.json"]
    assert te == ["safetensors", paths, {k: f"te/{v}" for k, v in index["weight_map"].items()}]
    assert none is None
    assert "'../vae/diffusion_pytorch_model.safetensors' is outside the folder" in refused["message"]
    assert not hub_client.hub.requests(r"safetensors$")


def test_cache_dir(hub_client: HubClient, tmp_path: Path) -> None:
    publish(hub_client)
    place = hub_client.run(
        f"from pathlib import Path\ns = resolve('user/model', HubOptions(cache_dir=Path({str(tmp_path / 'c')!r})))\n"
        f"s.fetch(['{WEIGHTS}']); result = str(s.local('{WEIGHTS}'))"
    )
    assert place.startswith(str(tmp_path / "c" / "models--user--model"))
    assert cached(hub_client) == set()


@pytest.mark.parametrize("how", ["argument", "HF_HUB_OFFLINE"])
def test_offline_uses_the_cache(hub_client: HubClient, how: str) -> None:
    sha = publish(hub_client)
    offline = {"HF_HUB_OFFLINE": "1"} if how == "HF_HUB_OFFLINE" else {}
    argument = "HubOptions(local_files_only=True)" if how == "argument" else ""
    nothing = hub_client.run(f"result = attempt(lambda: resolve('user/model', {argument}))", env=offline)
    assert (nothing["error"], nothing["exit_code"]) == ("HubError", 5)
    assert nothing["message"] == "user/model is not in the cache, and the network may not be used"
    assert "--local-files-only" in nothing["hint"]
    assert not hub_client.hub.log

    hub_client.run("s = resolve('user/model'); s.fetch(['vae/diffusion_pytorch_model.safetensors'])")
    before = len(hub_client.hub.log)
    revision, files, config, header, absent, no_header, other = hub_client.run(
        f"s = resolve('user/model', {argument})\n"
        "s.fetch(['vae/diffusion_pytorch_model.safetensors', 'model_index.json'])\n"
        "result = [s.revision, {p: [f.size, f.sha256] for p, f in s.files().items()},\n"
        "          s.read_json('transformer/config.json'),\n"
        "          list(entries(s, 'vae/diffusion_pytorch_model.safetensors')),\n"
        f"          attempt(lambda: s.fetch(['{WEIGHTS}'])), attempt(lambda: entries(s, '{WEIGHTS}')),\n"
        f"          attempt(lambda: resolve('user/model@dev', {argument}))]",
        env=offline,
    )
    assert len(hub_client.hub.log) == before
    assert revision == sha
    assert set(files) == set(PIPELINE)
    vae = PIPELINE["vae/diffusion_pytorch_model.safetensors"]
    assert isinstance(vae, bytes)
    assert files["vae/diffusion_pytorch_model.safetensors"] == [len(vae), hashlib.sha256(vae).hexdigest()]
    assert config == {}
    assert header == ["layer.0.weight"]
    for outcome in (absent, no_header):
        assert outcome["exit_code"] == 5
        assert outcome["message"] == f"user/model: {WEIGHTS} is not in the cache, and the network may not be used"
    assert other["message"] == "user/model (revision dev) is not in the cache, and the network may not be used"


def test_offline_without_a_listing(hub_client: HubClient) -> None:
    """A cache that another tool filled, or an older client, has no listing: what is there counts."""
    sha = publish(hub_client)
    hub_client.run("resolve('user/model')")
    shutil.rmtree(hub_client.home / "hub" / "models--user--model" / "trees")
    result = hub_client.run(
        "s = resolve('user/model', HubOptions(local_files_only=True)); result = [s.revision, sorted(s.files())]"
    )
    assert result == [sha, sorted(SMALL)]


def test_token_is_sent_and_never_shown(hub_client: HubClient) -> None:
    state = hub_client.hub.state
    state.add_user("me", TOKEN)
    state.create_repo("user/private", private=True, readers=["me"])
    state.commit("user/private", PIPELINE)
    state.create_repo("user/gated", gated=True, readers=["me"])
    state.commit("user/gated", PIPELINE)
    hub_client.hub.faults += [
        Fault("models/user/broken", status=500, body=f'{{"error": "{TOKEN} is bad"}}'.encode()),
        Fault("models/user/teapot", status=418, headers={"X-Error-Message": f"no {TOKEN}"}),
        Fault("models/user/reset", reset=True),
    ]
    result = hub_client.run(
        "import sys\n"
        "token = sys.stdin.read()\n"
        "s = resolve('user/private', HubOptions(token=token))\n"
        f"s.fetch(['{WEIGHTS}']); entries(s, '{WEIGHTS}')\n"
        "g = resolve('user/gated', HubOptions(token=token)); entries(g, 'vae/diffusion_pytorch_model.safetensors')\n"
        "names = ['user/broken', 'user/teapot', 'user/reset', 'user/none', 'user/private@none']\n"
        "result = [repr(s), str(s), repr(g)] + [attempt(lambda: resolve(n, HubOptions(token=token))) for n in names]\n"
        "private = lambda token: attempt(lambda: resolve('user/private', HubOptions(token=token)))\n"
        "result += [private(token + '\\n'), private(token + ' x'), private('')]\n"
        "result += [attempt(lambda: s.fetch(['no'])), private(token + 'x')]",
        stdin=TOKEN,
    )
    assert [outcome["exit_code"] for outcome in result[3:11]] == [5] * 8
    assert all("the token has characters" in outcome["message"] for outcome in result[8:11])
    assert result[-1]["message"] == "user/private: the Hub does not accept the token (401)"
    for outcome in result[3:5]:
        # This Hub repeats the token in its answer, so a debug traceback, which quotes the answer, has it too.
        del outcome["traceback"]
    shown = json.dumps(result) + hub_client.stderr
    assert TOKEN not in shown
    assert "sEcReT" not in shown
    authorized = [entry.token for entry in hub_client.hub.requests("user/private|user/gated", server="hub")]
    assert authorized
    assert set(authorized) == {TOKEN, TOKEN + "x"}
    stored = hub_client.hub.requests("", server="store")
    assert stored
    assert {entry.token for entry in stored} == {None}
    written = [file.read_bytes() for file in hub_client.home.rglob("*") if file.is_file()]
    assert not any(TOKEN.encode() in content for content in written)


def test_hostile_listing(hub_client: HubClient) -> None:
    """Names that leave the folder are not taken over from the Hub."""
    sha = publish(hub_client)
    siblings = [{"rfilename": name, "size": 1} for name in ("../../x.json", "/etc/passwd", "a\\..\\b.json", "c.json")]
    info = {"id": "user/evil", "sha": sha, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
    hub_client.hub.faults += [
        Fault("models/user/evil/tree", status=200, body=b"[]", headers={"Content-Type": "application/json"}),
        Fault("models/user/evil", status=200, body=json.dumps(info).encode()),
    ]
    assert hub_client.run("result = list(resolve('user/evil').files())") == ["c.json"]


def test_a_range_is_one_request_for_just_these_bytes(hub_client: HubClient) -> None:
    publish(hub_client)
    content = PIPELINE[WEIGHTS]
    assert isinstance(content, bytes)
    read = hub_client.run(
        f"source, path = resolve('user/model'), {WEIGHTS!r}\n"
        "parts = [source.read_range(path, 5, 90).hex(), source.read_range(path, 95, 0).hex()]\n"
        f"result = [*parts, attempt(lambda: source.read_range(path, 5, {len(content) - 4}))]"
    )
    assert read[:2] == [content[5:95].hex(), ""]
    assert read[2]["error"] == "SourceError"
    assert read[2]["message"] == f"user/model: {WEIGHTS} is truncated"
    assert [request.range for request in hub_client.hub.requests(WEIGHTS, server="hub")] == ["bytes=5-94"]
