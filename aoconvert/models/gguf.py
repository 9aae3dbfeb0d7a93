"""GGUF files of language models: the config that transformers makes of one, and what says how it is stored.

Source: ``transformers.modeling_gguf_pytorch_utils`` and ``transformers.integrations.gguf``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aoconvert.environment import version_of
from aoconvert.errors import SourceError
from aoconvert.formats.gguf.header import GgufHeader, read_header
from aoconvert.sources.base import show
from aoconvert.sources.byte_source import LocalFile

METHOD = "gguf"
_DENOISER = "of a diffusers denoiser, --config FOLDER or REPO names the pipeline or model whose config it has"


def quantization(place: Path) -> dict[str, Any]:
    """What stands in a config for a model that is in a GGUF file: its architecture, and transformers' values for it.

    Raises:
        SourceError: the file is damaged, or gguf is not installed.
    """
    with LocalFile(place) as file:
        header = read_header(file, place.name)
    if find_spec("gguf") is None:
        raise SourceError(
            f"{place.name} is a GGUF file, and gguf is not installed",
            hint="pip install gguf: its code gives the values back",
        )
    return {"quant_method": METHOD, "architecture": header.architecture, "values": _values(place, header)}


def _values(place: Path, header: GgufHeader) -> Mapping[str, Any] | None:
    """What transformers' loader calls the config; ``None`` where it has no conversion for the architecture."""
    from transformers import modeling_gguf_pytorch_utils as library

    if not header.architecture or header.splits > 1 or is_read_by_conversions(header.architecture):
        return None
    try:
        found = library.load_gguf_checkpoint(str(place), return_tensors=False)["config"]
    except Exception:  # it looks for what is not there
        return None
    return {key: _plain(value) for key, value in found.items()}


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def is_read_by_conversions(architecture: str) -> bool:
    """Whether transformers reads the architecture by conversions of its own, dequantizing in the model's dtype."""
    try:
        from transformers.integrations.gguf import GGUF_ARCHS
    except ImportError:  # before transformers 5.20
        return False
    return architecture in GGUF_ARCHS


def make_tokenizer(place: Path) -> tuple[TemporaryDirectory[str], str | None]:
    """What transformers makes of a file's tokenizer, in a folder; or why it makes nothing of it."""
    import transformers

    from aoconvert.models.transformers import quiet

    folder = TemporaryDirectory(prefix="aoconvert-")
    try:
        with quiet():
            made = transformers.AutoTokenizer.from_pretrained(
                place.parent, gguf_file=place.name, local_files_only=True, trust_remote_code=False
            )
            made.save_pretrained(folder.name)
    except Exception as error:  # whatever the conversion raises
        why = (str(error).splitlines() or [type(error).__name__])[0]
        return TemporaryDirectory(prefix="aoconvert-"), f"its tokenizer is not carried over: transformers says: {why}"
    return folder, None


def read_config(place: Path, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The config that transformers makes of a file, with the class that its auto class takes for it.

    Args:
        place: the file.
        stored: what ``quantization`` says of it.

    Raises:
        SourceError: transformers has no conversion for its architecture.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    from aoconvert.models.transformers import quiet

    architecture = stored["architecture"]
    with LocalFile(place) as file:
        splits = read_header(file, place.name).splits
    if splits > 1:
        raise SourceError(
            f"{place.name} is one of {splits} files into which a model was split",
            hint="join them: llama-gguf-split --merge FIRST.gguf JOINED.gguf",
        )
    unknown = SourceError(
        f"{place.name}: transformers {version_of('transformers')} has no conversion for a GGUF file of the "
        f"architecture {show(architecture)}",
        hint=_DENOISER,
    )
    if is_read_by_conversions(architecture):
        raise SourceError(
            f"{place.name}: aoconvert does not read GGUF files of the architecture {show(architecture)}",
            hint="start from the original weights, as safetensors or .bin",
        )
    if stored["values"] is None:
        raise unknown
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(place.parent, gguf_file=place.name)
    except Exception as error:
        raise unknown from error
    names = config.architectures
    if not names:
        tables = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
        found = next((table[config.model_type] for table in tables if config.model_type in table), None)
        if found is None:
            raise unknown
        names = [found if isinstance(found, str) else found[0]]
    values = {key: value for key, value in config.to_dict().items() if key not in ("dtype", "torch_dtype")}
    return {**values, "architectures": list(names)}
