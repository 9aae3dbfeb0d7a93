"""The name ``aoconvert.plan`` is the function, whatever has been imported; and it imports no torch."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_function_stays_when_the_package_is_imported() -> None:
    code = """
import sys
import aoconvert
assert not {"torch", "pydantic", "diffusers", "transformers", "huggingface_hub"} & set(sys.modules)
import aoconvert.planning.build
from aoconvert.planning import Plan
assert callable(aoconvert.plan) and aoconvert.plan.__module__ == "aoconvert.api", aoconvert.plan
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
