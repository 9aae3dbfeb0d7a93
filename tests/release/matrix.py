"""A release of several tiny models in several schemes, on the loopback Hub."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fake_hub.fixtures import HubClient
from helpers.checkpoints import build_llama
from helpers.documents import check_document
from helpers.forking import WITHOUT_HUB

TOKEN = "hf_theTokenOfTheTests0123456789abcdefgh"
COLLECTION = "Tiny quantized"
RECIPE = """
default = "int8wo"
[[rule]]
match = 're:.*\\.(q_proj|q|to_q)'
scheme = "float8wo"
"""
SCHEMES = {
    "int8wo": 'scheme = "int8wo"',
    "float8wo": 'scheme = "float8wo"',
    "intx4wo": 'scheme = "intx4wo"\ngroup_size = 32',
    "mixed": 'recipe = "mixed.toml"',
}

Event = dict[str, Any]


@dataclass
class Matrix:
    """A release file with its models, and the Hub that it goes to.

    Attributes:
        client: the Hub, and processes that use it.
        folder: of the release file.
        models: names of models; ``llama`` is built, those of a user are on the Hub, others are of ``checkpoints``.
        schemes: keys of ``SCHEMES``.
        events: of the last run.
    """

    client: HubClient
    folder: Path
    models: tuple[str, ...]
    schemes: tuple[str, ...]
    events: list[Event] = field(default_factory=list)

    def build(self, checkpoints: Callable[[str], Path]) -> None:
        """Make the models, the file and the user."""
        self.folder.mkdir()
        for name in self.models:
            if name == "llama":
                build_llama(self.folder / name)
            elif "/" not in name:
                (self.folder / name).symlink_to(checkpoints(name))
        (self.folder / "mixed.toml").write_text(RECIPE)
        self.write()
        self.client.hub.state.add_user("me", TOKEN)

    def write(self, **more: str) -> None:
        """Write the release file; ``more``: lines of TOML for a scheme's variants."""
        lines = [
            'name = "Tiny"',
            'repo = "{owner}/{model}-{variant}"',
            f'collection = "{COLLECTION}"',
            'license = "mit"',
        ]
        lines += [f'[[models]]\nsource = "{name}"' for name in self.models]
        lines += ['[defaults]\ndevice = "cpu"\nmin_quantized = 0', "[gates]\nrequire_forward = true"]
        lines += [f"[[variants]]\n{SCHEMES[name]}\n{more.get(name, '')}" for name in self.schemes]
        (self.folder / "tiny.toml").write_text("\n".join(lines) + "\n")

    @property
    def variants(self) -> list[str]:
        """Names of all, in the file's order."""
        return [f"{model.rpartition('/')[2]}-{scheme}" for model in self.models for scheme in self.schemes]

    @property
    def root(self) -> Path:
        """Of what is made."""
        return self.folder / "out/tiny"

    def run(self, *more: str) -> int:
        """Run to the end; gives the exit code, and leaves the events."""
        done = self.client.command(*self._words(*more), token=TOKEN)
        assert all(line.startswith("warning: ") for line in done.stderr.splitlines()), done.stderr
        self.events = [json.loads(line) for line in done.stdout.splitlines()]
        for event in self.events:
            check_document("release-event" if "event" in event else "error", event)
        return done.returncode

    def stop(self, when: Callable[[Event], bool], number: signal.Signals) -> None:
        """Run until an event fits, and send that run a signal."""
        assert self.client.forker is not None
        imports = WITHOUT_HUB + self.client.forker.fork_children_of_verify()
        env = self.client.environment({"HF_TOKEN": TOKEN})
        pipes: Any = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.DEVNULL,
            "text": True,
        }
        process = self.client.forker.popen(["-m", "aoconvert", *self._words()], imports, env=env, **pipes)
        self.events = []
        assert process.stdout is not None
        for line in process.stdout:
            self.events.append(json.loads(line))
            if when(self.events[-1]):
                break
        process.send_signal(number)
        rest = process.stdout.read().splitlines()
        assert process.wait() == (130 if number == signal.SIGINT else -number), "it came to its end"
        for line in rest:  # what it said before the signal came
            if line.endswith("}"):
                self.events.append(json.loads(line))

    def _words(self, *more: str) -> list[str]:
        out = str(self.folder / "out")
        return ["release", str(self.folder / "tiny.toml"), "--owner", "me", "--output-root", out, "--json", *more]

    def told(self, event: str, **values: Any) -> list[str]:
        """Variants of which this was said."""
        return [
            line["variant"]
            for line in self.events
            if line.get("event") == event and all(line[key] == value for key, value in values.items())
        ]

    def commits(self) -> dict[str, int]:
        """Repo → commits."""
        state = self.client.hub.state
        repos = [f"me/{name}" for name in self.variants]
        return {
            repo: len(state.history(repo, state.refs(repo)["main"]))
            for repo in repos
            if state.settings(repo) is not None
        }

    def uploads(self) -> Counter[str]:
        """Content (its address) → how often it was sent as a large file, completely."""
        return Counter(
            request.path for request in self.client.hub.requests("^/upload/", method="PUT") if request.status == 200
        )

    def sent(self) -> int:
        """Bytes of commits and large files that the Hub was sent."""
        return sum(request.received for request in self.client.hub.requests(r"^/upload/|/commit/"))

    def files(self) -> dict[str, tuple[int, int]]:
        """Weights files that are made: path → inode and time."""
        found = list(self.root.glob("*/**/*.bin")) if self.root.is_dir() else []
        return {
            str(path.relative_to(self.root)): (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in found
            if not path.relative_to(self.root).parts[0].startswith(".")
        }

    def listed(self) -> list[str]:
        """Repos in the release's collection."""
        root = self.client.hub.state.root
        [found] = json.loads((root / "collections.json").read_text()).values()
        assert found["title"] == COLLECTION
        return [item["id"] for item in found["items"]]

    def links(self, variant: str) -> set[str]:
        """Repos that a variant's card links to."""
        card = self.client.hub.state.read(f"me/{variant}", "README.md").decode()
        return {name for name in self.variants if re.search(rf"me/{re.escape(name)}(?![\w-])", card)}
