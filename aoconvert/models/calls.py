"""What the ``__call__`` of a pipeline takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from aoconvert.environment import import_diffusers, quiet_imports

Default = bool | int | float | str | None


def call_parameters(class_name: str) -> Mapping[str, Default] | None:
    """The parameters of a diffusers pipeline's ``__call__``, in order.

    Returns:
        Name → default, ``None`` where there is no plain one. ``None`` in all where diffusers has no such class.
    """
    diffusers = import_diffusers()
    with quiet_imports():  # a pipeline imports the models of its parts
        cls = getattr(diffusers, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        return None
    parameters = list(inspect.signature(cls.__call__).parameters.values())[1:]  # without self
    return {item.name: item.default if isinstance(item.default, Default) else None for item in parameters}
