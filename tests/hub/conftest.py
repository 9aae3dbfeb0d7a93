from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.forking import Forker
from helpers.shared import build_once
from pushing import Pusher, pusher

# kind → builder in tests/helpers/tiny.py, and options of quantize
KINDS = {
    "shards": ("opt", {"max_shard_size": "20KB", "min_quantized": 0}),
    "older": ("opt", {"min_quantized": 0}),
    "pipeline": ("cogvideox_pipeline", {}),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A quantized and verified checkpoint by its kind; not to be changed: see ``fresh``."""

    def build(root: Path) -> None:
        from helpers import tiny

        import aoconvert

        builder, options = KINDS[root.name]
        getattr(tiny, builder)(root / "source")
        aoconvert.quantize(root / "source", "int8wo", output=root / "out", device="cpu", **options)
        assert aoconvert.verify(root / "out", reload=root.name == "pipeline").ok

    return lambda kind: build_once(tmp_path_factory, f"push/{kind}", build) / "out"


@pytest.fixture
def fresh(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a checkpoint; times of change are kept."""
    import shutil

    def copy(kind: str = "shards") -> Path:
        return Path(shutil.copytree(checkpoint(kind), tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"))

    return copy


@pytest.fixture
def me(tmp_path: Path, forker: Forker) -> Iterator[Pusher]:
    """A Hub of its own, and a client process."""
    with pusher(tmp_path / "one", forker) as found:
        yield found
