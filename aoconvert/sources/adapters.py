"""An adapter that lies beside a model's weights: transformers loads it with them where peft is installed.

Source: ``transformers.integrations.peft.maybe_load_adapters`` and ``load_adapter``, which look in the model's own
folder for these names, in this order.
"""

from __future__ import annotations

from aoconvert.sources.base import Source

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def adapter_files(source: Source, folder: str) -> tuple[str, ...]:
    """The adapter's config and the one weights file that is loaded, by their paths in the source.

    Either both or none: a config without its weights is not an adapter that anything can load, and weights without the
    config are never looked at.

    Args:
        source: where to look.
        folder: the model's, ``""`` for the root.
    """
    at = f"{folder}/" if folder else ""
    weights = next((at + name for name in ADAPTER_WEIGHTS if source.has(at + name)), None)
    if weights is None or not source.has(at + ADAPTER_CONFIG):
        return ()
    return (at + ADAPTER_CONFIG, weights)
