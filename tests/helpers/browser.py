"""Headless Chromium, as Debian packages it, on a file of this machine; without a network."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-extensions --hide-scrollbars --enable-logging=stderr"
    " --host-resolver-rules=MAP\u00a0*\u00a0~NOTFOUND"
)


@dataclass(frozen=True)
class Browser:
    """A browser, with a new profile for each page.

    Attributes:
        program: its path.
        folder: for profiles.
    """

    program: str
    folder: Path

    def read(self, page: Path) -> tuple[str, list[str]]:
        """The document as the browser understood it, and what it complained of on its console."""
        done = self._run("--dump-dom", page.absolute().as_uri())
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    def show(self, page: Path, picture: Path, width: int, *, dark: bool = False, height: int = 1600) -> None:
        """Write what a reader sees, as PNG."""
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        shot = (f"--window-size={width},{height}", f"--screenshot={picture.absolute()}")
        self._run(*shot, scheme, page.absolute().as_uri())

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        profile = self.folder / "profile"
        shutil.rmtree(profile, ignore_errors=True)
        flags = [flag.replace("\u00a0", " ") for flag in _FLAGS.split(" ")]
        command = [self.program, *flags, f"--user-data-dir={profile}", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


def find_browser(folder: Path) -> Browser:
    """The browser of this machine; skips the test where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("needs chromium (apt install chromium)")
    return Browser(program, folder)
