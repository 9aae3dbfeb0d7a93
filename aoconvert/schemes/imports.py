"""What has to be imported before a checkpoint can be loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

_PROTOTYPES = "torchao.prototype."


def imports(names: Iterable[str]) -> list[str]:
    """Modules that register the classes of a pickle with ``torch.serialization``.

    ``import torchao`` does it for its own, those of its prototypes register when they are imported themselves.

    Args:
        names: dotted, as in the pickle.
    """
    return ["torchao", *sorted({name.rpartition(".")[0] for name in names if name.startswith(_PROTOTYPES)})]
