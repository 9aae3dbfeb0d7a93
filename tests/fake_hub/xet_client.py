"""hf_xet in processes of its own, against a loopback Xet store without a Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fake_hub.cas import Cas
from fake_hub.traffic import Request, Traffic
from fake_hub.xet_store import XetStore

# The calls are those of _upload_xet_files and xet_get in huggingface_hub 2.4.0.
PRELUDE = """
import hf_xet, json, os, sys

endpoint, home = sys.argv[1:]
session = hf_xet.XetSession()

def upload(*paths, token="xet-write-abc"):
    with session.new_upload_commit(endpoint=endpoint, token=token, token_expiry_unix_secs=2**40) as commit:
        handles = [commit.start_upload_file(path, sha256=hf_xet.COMPUTE_SHA256) for path in paths]
    return [handle.result().xet_info.hash for handle in handles]

def download(files):
    with session.new_file_download_group(
        endpoint=endpoint, token="xet-read-abc", token_expiry_unix_secs=2**40
    ) as group:
        for xet_hash, size, path in files:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), path)

def attempt(call):
    try:
        return {"value": call()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}

result = None
"""


class KeepingStore(XetStore):
    """Also keeps the shards as they came."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.shards: list[bytes] = []

    def put_shard(self, body: bytes) -> bool:
        self.shards.append(body)
        return super().put_shard(body)


@dataclass
class Client:
    """Processes that use a store; every ``home`` has its own caches."""

    cas: Cas
    folder: Path
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def log(self) -> list[Request]:
        return self.traffic.log()

    def run(self, script: str, *, home: str = "home") -> Any:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        ours = {"HF_HOME": str(self.folder / home), "HF_XET_CLIENT_RETRY_BASE_DELAY": "50ms", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", f"{PRELUDE}\n{script}\nprint('\\n' + json.dumps(result))", self.cas.endpoint, home],
            env={**clean, **ours},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def write(self, name: str, content: bytes) -> str:
        (self.folder / name).write_bytes(content)
        return name

    def upload(self, name: str, *, home: str = "home") -> str:
        """Upload a file that was written; returns its Xet hash."""
        (xet_hash,) = self.run(f"result = upload({name!r})", home=home)
        return str(xet_hash)

    def count(self, part: str) -> int:
        return sum(part in request.path for request in self.log)

    def stored(self) -> int:
        """Bytes of all xorbs."""
        folder = self.cas.store.root / "xorbs"
        return sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".json")


@contextmanager
def xet_client(folder: Path) -> Iterator[Client]:
    """A running store in this folder, and a client for it."""
    folder.mkdir(exist_ok=True)
    cas = Cas(folder / "cas")
    cas.store = KeepingStore(folder / "cas")
    client = Client(cas, folder)
    cas.record = client.traffic.record
    cas.take_fault = lambda method, path: client.traffic.take_fault("cas", method, path)
    cas.start()
    try:
        yield client
    finally:
        cas.stop()
