"""The optional kernels are optional: without their package the same files are written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import aoconvert

_CONVERT = """
import sys
from importlib.util import find_spec
from pathlib import Path

# the finder of an editable install would find here what the copy does not have
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import aoconvert

assert Path(aoconvert.__file__).parents[1] == Path(sys.argv[1])
assert find_spec("aoconvert.kernels") is None
aoconvert.quantize(sys.argv[2], "int8wo", output=sys.argv[3], device="cpu", min_quantized=0.1)
"""


def files_of(folder: Path) -> dict[str, bytes]:
    """Path → content; of the manifest what does not tell one run from another."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads(found["aoconvert.json"])
    del manifest["run"]
    return {**found, "aoconvert.json": json.dumps(manifest).encode()}


def test_the_same_files_without_the_package(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """Even where kernels are asked for."""
    package = tmp_path / "site" / "aoconvert"
    shutil.copytree(Path(aoconvert.__file__).parent, package, ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    source = checkpoints("llama-tied")
    aoconvert.quantize(source, "int8wo", output=tmp_path / "whole", device="cpu", min_quantized=0.1)
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "AOCONVERT_COMPILE": "1"}
    arguments = [str(package.parent), str(source), str(tmp_path / "without")]
    subprocess.run([sys.executable, "-c", _CONVERT, *arguments], check=True, env=environment, cwd=tmp_path)
    assert files_of(tmp_path / "without") == files_of(tmp_path / "whole")
