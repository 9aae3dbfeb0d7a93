from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CogVideoX pipeline of real classes; never written to."""
    from aoconvert.demo import build_pipeline

    folder = tmp_path_factory.mktemp("cogvideox") / "tiny-cogvideox"
    build_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with an output head of its own; never written to."""
    from checkpoints import build_llama

    return build_llama(tmp_path_factory.mktemp("llama") / "tiny-llama")
