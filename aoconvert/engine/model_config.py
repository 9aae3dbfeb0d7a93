"""``config.json`` of a quantized model, with the ``quantization_config`` that diffusers and transformers read back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from aoconvert.cache import remember
from aoconvert.environment import import_diffusers, quiet_imports, versions
from aoconvert.models.configs import without_redirections

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig


def model_config(
    library: str,
    config: Mapping[str, Any],
    quantization: Mapping[str, Any] | None,
    dtype: str,
) -> str:
    """``config.json`` of the quantized model: the source's, with ``quantization_config`` and the dtype it now has.

    Args:
        library: ``diffusers`` or ``transformers``.
        config: the source's, with what else has changed.
        quantization: what :func:`quantization_config` gives; ``None`` for a model that is not quantized.
        dtype: of what is not quantized; ``auto``: the source's.
    """
    values = without_redirections(config) if library == "transformers" else dict(config)
    if library == "transformers":
        values.pop("torch_dtype", None)
        if dtype != "auto":
            values["dtype"] = dtype
    if quantization is not None:
        values["quantization_config"] = dict(quantization)
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def quantization_config(library: str, config: AOBaseConfig, skipped: Iterable[str]) -> dict[str, Any]:
    """The canonical ``quantization_config``, written by the library's own ``TorchAoConfig``.

    It is remembered: the import alone takes a second. Neither library applies it to weights that are quantized
    already, but both must be able to read it: its classes are in ``torchao.core.config.ALLOWED_AO_MODULES``.

    Args:
        library: ``diffusers`` or ``transformers``.
        config: torchao's config, as :func:`aoconvert.recipes.fqn_to_config` gives it.
        skipped: modules that a plain config does not hold for; an ``FqnToConfig`` names what it holds for, so these
            are left out there.
    """
    from torchao.core.config import config_to_dict
    from torchao.quantization import FqnToConfig

    skip = [] if isinstance(config, FqnToConfig) else list(skipped)
    facts = {"library": library, "versions": versions(), "config": config_to_dict(config), "skipped": skip}
    values: dict[str, Any] = remember("configs", facts, lambda: _quantization_config(library, config, skip))
    return values


def _quantization_config(library: str, config: AOBaseConfig, skipped: list[str]) -> dict[str, Any]:
    with quiet_imports():  # it reads the config back, and that imports all of torchao's configs
        if library == "diffusers":
            import_diffusers()
            from diffusers import TorchAoConfig
        else:
            from transformers import TorchAoConfig
        values: dict[str, Any] = TorchAoConfig(config, modules_to_not_convert=skipped).to_dict()
    return values
