"""How the tests of the loopback Hub ask it: by the client, in a process of its own, or as no client would."""

from __future__ import annotations

import hashlib
import json
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

from fake_hub.fixtures import HubClient

TOKEN = "hf_writes"

# What every script can use: an API as ``me``, others by token, and errors as what a caller sees of them.
HEAD = """
import os, warnings
from pathlib import Path
from huggingface_hub import CommitOperationAdd as Add, CommitOperationDelete as Delete, HfApi
api = HfApi(token="hf_writes")
work = Path(os.environ["HF_HOME"]) / "work"; work.mkdir(parents=True, exist_ok=True)

def tried(call):
    try:
        return call()
    except Exception as error:
        answer = getattr(error, "response", None)
        return {"error": type(error).__name__, "status": getattr(answer, "status_code", None), "text": str(error)}

def add(path, content):
    return Add(path, content)
"""


def run(client: HubClient, script: str, **options: Any) -> Any:
    """Run a script as ``me``, who may write."""
    client.hub.state.add_user("me", TOKEN)
    return client.run(HEAD + script, **options)


def raw(client: HubClient, method: str, path: str, body: bytes = b"", token: str | None = TOKEN) -> tuple[int, Any]:
    """A request as no client would send it."""
    connection = HTTPConnection(urlsplit(client.hub.endpoint).netloc)
    connection.request(method, path, body, {"Authorization": f"Bearer {token}"} if token else {})
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
