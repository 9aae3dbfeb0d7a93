"""What runs in fresh interpreters: a model at a time."""

from pathlib import Path

FOLDER = Path(__file__).parent
