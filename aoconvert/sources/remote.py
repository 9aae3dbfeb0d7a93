"""A file on the Hub as a ``ByteSource``: ranged requests, each block at most once."""

from __future__ import annotations

from aoconvert.errors import HubError
from aoconvert.sources.hub_errors import translate_errors

# One request costs more time than 64 kB; a zip directory and a small data.pkl fit into one or two.
_BLOCK = 1 << 16


class RangedFile:
    """A file of a repo at one commit.

    Attributes:
        size: bytes of the file, as the Hub says.
        fetched: bytes of bodies that were received.
    """

    def __init__(self, repo_id: str, commit: str, path: str, size: int, token: str | None) -> None:
        self.size = size
        self.fetched = 0
        self._repo_id, self._commit, self._path = repo_id, commit, path
        self._token = token
        self._blocks: dict[int, bytes] = {}

    def read(self, offset: int, count: int) -> bytes:
        """Exactly ``count`` bytes from ``offset``, which lie inside the file.

        Raises:
            HubError: the Hub refused, broke off, or does not answer ranged requests.
        """
        if count <= 0:
            return b""
        first, last = offset // _BLOCK, (offset + count - 1) // _BLOCK
        place = first
        while place <= last:
            if place in self._blocks:
                place += 1
                continue
            stop = place
            while stop <= last and stop not in self._blocks:
                stop += 1
            self._fetch(place, stop)
            place = stop
        joined = b"".join(self._blocks[number] for number in range(first, last + 1))
        start = offset - first * _BLOCK
        return joined[start : start + count]

    def _fetch(self, first: int, stop: int) -> None:
        """Blocks ``first`` to ``stop - 1`` in one request."""
        data = self.read_range(first * _BLOCK, min(stop * _BLOCK, self.size))
        self.fetched += len(data)
        for number in range(first, stop):
            self._blocks[number] = data[(number - first) * _BLOCK : (number - first + 1) * _BLOCK]

    def read_range(self, begin: int, end: int) -> bytes:
        """Bytes ``begin`` to ``end - 1`` in one request for these alone; nothing is kept.

        Raises:
            HubError: as :meth:`read`.
        """
        data = self._get(begin, end)
        if len(data) != end - begin:
            raise HubError(
                f"{self._repo_id}: {self._path}: {len(data):,} bytes arrived instead of {end - begin:,}",
                hint="try again; a proxy may have cut the answer",
                retryable=True,
            )
        return data

    def _get(self, begin: int, end: int) -> bytes:
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not in __all__
            build_hf_headers,
            hf_raise_for_status,
        )

        headers = {
            **build_hf_headers(token=self._token),
            "Range": f"bytes={begin}-{end - 1}",
            "Accept-Encoding": "identity",
        }
        with translate_errors(self._repo_id, self._commit):
            url = hf_hub_url(self._repo_id, self._path, revision=self._commit)
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as response:
                hf_raise_for_status(response)
                if response.status_code != 206 and end - begin != self.size:
                    # read no further: the answer is the whole file
                    raise HubError(
                        f"{self._repo_id}: {self._path}: the server does not support requests for part of a file",
                        hint="check HF_ENDPOINT and the proxy, or download the file and inspect it",
                    )
                received = bytearray()
                for part in response.iter_bytes():
                    received += part
                    if len(received) > end - begin:
                        break
                return bytes(received)
