"""What the ``__call__`` of a pipeline takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from aoconvert.cache import remember
from aoconvert.environment import import_diffusers, quiet_imports, version_of

Default = bool | int | float | str | None


def call_parameters(class_name: str) -> Mapping[str, Default] | None:
    """The parameters of a diffusers pipeline's ``__call__``, in order.

    Returns:
        Name → default, ``None`` where there is no plain one. ``None`` in all where diffusers has no such class.
    """
    # importing a pipeline takes seconds; what its class takes follows from its name and the versions
    facts = {"class": class_name, **{name: version_of(name) for name in ("diffusers", "transformers", "torch")}}
    found: Mapping[str, Default] | None = remember("calls", facts, lambda: _ask(class_name))
    return found


def _ask(class_name: str) -> Mapping[str, Default] | None:
    diffusers = import_diffusers()
    with quiet_imports():  # a pipeline imports the models of its parts
        cls = getattr(diffusers, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        return None
    parameters = list(inspect.signature(cls.__call__).parameters.values())[1:]  # without self
    return {item.name: item.default if isinstance(item.default, Default) else None for item in parameters}
