"""The loopback Xet store, driven by the released hf_xet as huggingface_hub drives it."""

from __future__ import annotations

import hashlib
import json
import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fake_hub.cas import Cas
from fake_hub.traffic import Fault
from fake_hub.xet_client import Client, xet_client
from fake_hub.xet_format import MAX_CHUNK, parse_xorb


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with xet_client(tmp_path) as client:
        yield client


def _contents() -> dict[str, bytes]:
    """Files that hf_xet cuts and compresses in different ways."""
    rng = random.Random(0)
    weights = np.random.default_rng(0).standard_normal(200_000)
    return {
        "random": rng.randbytes(3_000_000),
        "text": b"".join(b"%d: the same words in every line\n" % number for number in range(30_000)),
        "zeros": bytes(700_001),
        "floats": weights.astype(np.float32).tobytes() + b"odd",
        "halves": weights.astype(np.float16).tobytes(),
        "three bytes": b"abc",
        "one byte": b"\0",
        "empty": b"",
    }


CONTENTS = _contents()


@dataclass(frozen=True)
class Trip:
    """What became of the files: uploaded from one home, downloaded into another."""

    client: Client
    hashes: dict[str, str]
    downloads: dict[str, bytes]


@pytest.fixture(scope="module")
def trip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trip]:
    with xet_client(tmp_path_factory.mktemp("trip")) as client:
        for name, content in CONTENTS.items():
            client.write(name, content)
        hashes = client.run(f"result = upload(*{list(CONTENTS)!r})")
        wanted = [
            (xet_hash, len(content), str(client.folder / f"{name}.back"))
            for xet_hash, (name, content) in zip(hashes, CONTENTS.items(), strict=True)
        ]
        client.run(f"download({wanted!r})", home="elsewhere")
        downloads = {name: (client.folder / f"{name}.back").read_bytes() for name in CONTENTS}
        yield Trip(client, dict(zip(CONTENTS, hashes, strict=True)), downloads)


# What was uploaded can be had again


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_comes_back_as_it_was_uploaded(trip: Trip, name: str) -> None:
    content = CONTENTS[name]
    assert trip.downloads[name] == content
    assert trip.client.cas.read(trip.hashes[name]) == content
    assert trip.client.cas.lookup(hashlib.sha256(content).hexdigest()) == (trip.hashes[name], len(content))


def test_the_files_used_every_compression_scheme(trip: Trip) -> None:
    xorbs = [file for file in (trip.client.cas.store.root / "xorbs").iterdir() if file.suffix != ".json"]
    assert {chunk.scheme for xorb in xorbs for chunk in parse_xorb(xorb.read_bytes())} == {0, 1, 2}


def test_the_store_survives_a_restart(trip: Trip) -> None:
    again = Cas(trip.client.cas.store.root)
    assert again.read(trip.hashes["random"]) == CONTENTS["random"]
    assert again.lookup(hashlib.sha256(b"abc").hexdigest()) == (trip.hashes["three bytes"], 3)


def test_unknown_files_are_not_found(trip: Trip) -> None:
    assert trip.client.cas.lookup("0" * 64) is None
    with pytest.raises(KeyError):
        trip.client.cas.read("f" * 64)
    failed = trip.client.run(f"result = attempt(lambda: download([({'f' * 64!r}, 5, os.path.abspath('none'))]))")
    assert "404" in failed["error"]


def test_a_range_of_a_file_comes_with_little_around_it(trip: Trip) -> None:
    content = CONTENTS["random"]
    ranges = [(0, 1), (0, 3_000_000), (1_234_567, 1_600_000), (1_234_567, 1_234_568), (2_999_999, 3_000_000)]
    script = f"""
group = session.new_download_stream_group(endpoint=endpoint, token="xet-read-abc", token_expiry_unix_secs=2**40)
info = hf_xet.XetFileInfo({trip.hashes["random"]!r}, {len(content)})
result = [b"".join(group.download_stream(info, first, end)).hex() for first, end in {ranges!r}]
"""
    before = len(trip.client.log)
    found = trip.client.run(script, home="ranges")
    assert [bytes.fromhex(part) for part in found] == [content[first:end] for first, end in ranges]
    sent = sum(request.body_bytes for request in trip.client.log[before:] if request.path.startswith("/fetch/"))
    assert sent < sum(end - first for first, end in ranges) + len(ranges) * 2 * (MAX_CHUNK + 8)


# What is there already is not sent again


def test_a_file_with_known_content_sends_only_what_is_new(client: Client) -> None:
    shared = random.Random(1).randbytes(2_000_000)
    client.upload(client.write("first", shared))
    before = client.stored()
    name = client.write("second", shared[:1_000_000] + b"something new" * 100 + shared[1_000_000:])
    xet_hash = client.upload(name)
    assert client.cas.read(xet_hash) == (client.folder / name).read_bytes()
    assert before > 2_000_000
    assert 0 < client.stored() - before < 400_000


def test_a_file_of_moved_and_repeated_parts_comes_back(client: Client) -> None:
    parts = [random.Random(number).randbytes(600_000) for number in range(3)]
    client.upload(client.write("parts", b"".join(parts)))
    content = parts[2] + parts[0] + parts[2] + parts[0][:300_000]
    xet_hash = client.upload(client.write("moved", content))
    assert client.stored() < 2_400_000  # of 3 900 000 bytes in both files
    assert client.cas.read(xet_hash) == content
    back = str(client.folder / "back")
    client.run(f"download([({xet_hash!r}, {len(content)}, {back!r})])", home="elsewhere")
    assert Path(back).read_bytes() == content


def test_the_same_upload_again_sends_no_xorb(client: Client) -> None:
    name = client.write("file", random.Random(2).randbytes(300_000))
    first = client.upload(name)
    assert client.count("/v1/xorbs/") == 1
    assert client.upload(name) == first
    assert client.count("/v1/xorbs/") == 1
    before = client.stored()
    assert client.upload(name, home="elsewhere") == first  # which knows of no earlier upload
    assert client.count("/v1/xorbs/") == 2
    assert client.stored() == before


# Faults


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/v1/xorbs/", method="POST", status=500, times=1),
        Fault("/v1/xorbs/", method="POST", status=429, times=1),
        Fault("/v1/xorbs/", method="POST", reset=True, times=1),
        Fault("/v1/xorbs/", method="POST", reset_after=100_000, times=1),
        Fault("/v1/xorbs/", method="POST", lose_answer=True, times=1),
        Fault("/v2/shards", method="POST", status=503, times=1),
        Fault("/v2/shards", method="POST", reset=True, times=1),
        Fault("/v2/shards", method="POST", lose_answer=True, times=1),
    ],
)
def test_an_upload_goes_on_after_a_passing_fault(client: Client, fault: Fault) -> None:
    client.traffic.add_faults([fault])
    content = random.Random(3).randbytes(200_000)
    assert client.cas.read(client.upload(client.write("file", content))) == content
    assert client.count(fault.pattern) == 2


@pytest.mark.parametrize("path", ["/v1/xorbs/", "/v2/shards"])
@pytest.mark.parametrize("status", [401, 403, 413])
def test_an_upload_ends_with_an_error_when_it_is_refused(client: Client, path: str, status: int) -> None:
    client.traffic.add_faults([Fault(path, method="POST", status=status)])
    client.write("file", b"content" * 10_000)
    failed = client.run("result = attempt(lambda: upload('file'))")
    assert str(status) in failed["error"]
    assert client.cas.lookup(hashlib.sha256(b"content" * 10_000).hexdigest()) is None


def test_a_download_goes_on_after_a_cut_answer(trip: Trip) -> None:
    trip.client.traffic.add_faults([Fault("/fetch/", cut_after=1000, times=1)])
    before = len(trip.client.log)
    wanted = (trip.hashes["random"], len(CONTENTS["random"]), str(trip.client.folder / "again"))
    trip.client.run(f"download([{wanted!r}])", home="third")
    cut, *rest = [request.body_bytes for request in trip.client.log[before:] if request.path.startswith("/fetch/")]
    assert cut == 1000 and sum(rest) > 2_900_000
    assert (trip.client.folder / "again").read_bytes() == CONTENTS["random"]


# What the store refuses


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _ask(method: str, url: str, *, token: str | None = None, body: bytes | None = None, span: str = "") -> int:
    head = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, body, {**head, **({"Range": span} if span else {})}, method=method)
    try:
        with OPENER.open(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    ("method", "path", "token", "status"),
    [
        ("GET", "/v2/reconstructions/{file}", None, 401),
        ("GET", "/v2/reconstructions/{file}", "hf_abc", 401),
        ("GET", "/v2/reconstructions/{file}", "xet-read-abc", 200),
        ("GET", "/v2/reconstructions/{file}", "xet-write-abc", 200),
        ("POST", "/v2/shards", None, 401),
        ("POST", "/v2/shards", "xet-read-abc", 403),
        ("POST", "/v2/shards", "xet-write-abc", 400),
        ("POST", "/v1/xorbs/default/{file}", "xet-read-abc", 403),
        ("POST", "/v1/xorbs/default/{file}", "xet-write-abc", 400),
        ("POST", "/v1/xorb-grants/default/{file}", "xet-write-abc", 404),
        ("GET", "/fetch/{file}?range=0-5&key=guess", "xet-write-abc", 403),
    ],
)
def test_tokens_decide_who_may_do_what(trip: Trip, method: str, path: str, token: str | None, status: int) -> None:
    url = trip.client.cas.endpoint + path.format(file=trip.hashes["random"])
    assert _ask(method, url, token=token, body=b"{}" if method == "POST" else None) == status


def test_a_fetch_may_read_only_the_range_it_was_signed_for(trip: Trip) -> None:
    cas = trip.client.cas
    address = f"{cas.endpoint}/v2/reconstructions/{trip.hashes['text']}"
    request = urllib.request.Request(address, headers={"Authorization": "Bearer xet-read-abc"})
    with OPENER.open(request, timeout=10) as answer:
        ((fetch,),) = json.load(answer)["xorbs"].values()
    span = fetch["ranges"][0]["bytes"]
    assert _ask("GET", fetch["url"], span=f"bytes={span['start']}-{span['end']}") == 206
    assert _ask("GET", fetch["url"], span=f"bytes={span['start']}-{span['end'] + 1}") == 403
    assert _ask("GET", fetch["url"]) == 403
