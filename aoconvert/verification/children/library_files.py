"""How the library opens a single file in its authors' names. For ``library_child`` alone.

A file of safetensors, and a torch file that is a zip, stay mapped: in the dtype that they are stored in only what the
library's conversion puts together takes memory.
"""

from __future__ import annotations

import importlib
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class NoMemory(Exception):
    """The library needs more memory than there is."""


class SingleFile:
    """One file, and a folder with its config.

    Args:
        file: the file.
        config: of the model, or of the pipeline with all its parts.
        available: bytes of memory that may be used.

    Attributes:
        part: the folder of the model in that.
        mixed: it holds several floating dtypes, and the pipeline is in none of them.
    """

    def __init__(self, file: str, config: str, available: int) -> None:
        utils = importlib.import_module("diffusers.loaders.single_file_utils")
        self.file, self.config, self.available = file, config, available
        self.part, self.mixed = "", False
        whole = Path(file).stat().st_size if not file.endswith(".safetensors") and not zipfile.is_zipfile(file) else 0
        self._require(whole, Path(file).name)
        found = utils.load_single_file_checkpoint(file, local_files_only=True)
        self.tensors: dict[str, torch.Tensor] = {n: t for n, t in found.items() if isinstance(t, torch.Tensor)}

    @property
    def stored(self) -> torch.dtype | None:
        """The floating dtype that most of its bytes are in."""
        counts: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype in _FLOATS:
                counts[tensor.dtype] += tensor.nbytes
        return counts.most_common(1)[0][0] if counts else None

    def open_pipeline(self) -> Any:
        """``from_single_file`` of the pipeline: in the dtype of the file, in float32 where there are several.

        Raises:
            NoMemory: the file does not fit: text encoders are put together in memory.
        """
        dtypes = {tensor.dtype for tensor in self.tensors.values() if tensor.dtype in _FLOATS}
        self.mixed = len(dtypes) > 1
        self._require((2 if self.mixed else 1) * Path(self.file).stat().st_size, "the pipeline")
        index = json.loads((Path(self.config) / "model_index.json").read_text(encoding="utf-8"))
        cls = getattr(importlib.import_module("diffusers"), index["_class_name"])
        dtype = torch.float32 if self.mixed else self.stored
        pipe = cls.from_single_file(self.file, config=self.config, torch_dtype=dtype, local_files_only=True)
        for part in pipe.components.values():
            if hasattr(part, "tie_weights"):
                part.tie_weights()  # which it leaves to others
        return pipe

    def open(self, cls: Any, dtype: torch.dtype | None) -> Any:
        """``from_single_file`` of one model.

        Raises:
            NoMemory: what the library copies does not fit.
        """
        self._require(self._copied(cls, dtype), cls.__name__)
        options = {"config": self.config, "subfolder": self.part, "torch_dtype": dtype, "local_files_only": True}
        return cls.from_single_file(dict(self.tensors), **options)

    def types(self, cls: Any, dtype: torch.dtype | None) -> Any:
        """The model as the library makes it in a dtype, with names, shapes and dtypes and no values.

        What the class keeps in float32 is float32, as ``from_pretrained`` gives it; ``from_single_file`` casts it, too.
        """
        options = {"config": self.config, "subfolder": self.part, "torch_dtype": dtype, "local_files_only": True}
        options["device"] = "meta"
        model = cls.from_single_file(self._empty(), **options)
        kept = set(getattr(cls, "_keep_in_fp32_modules", None) or ())
        for name, module in model.named_modules():
            for leaf, tensor in module.named_parameters(recurse=False):
                if kept.intersection((*name.split("."), leaf)):
                    wide = torch.empty_like(tensor, dtype=torch.float32)
                    setattr(module, leaf, torch.nn.Parameter(wide, requires_grad=False))
        return model

    def _empty(self) -> dict[str, torch.Tensor]:
        return {name: torch.empty_like(tensor, device="meta") for name, tensor in self.tensors.items()}

    def _copied(self, cls: Any, dtype: torch.dtype | None) -> int:
        """Bytes of the model that are not a part of what is stored: tensors put together, and other dtypes."""
        library = importlib.import_module("diffusers.loaders.single_file_model")
        given = self._empty()
        kept, stored = list(given.values()), {_storage(tensor) for tensor in given.values()}
        made: Any = given
        if (kind := library._get_single_file_loadable_mapping_class(cls)) is not None:
            config = cls.load_config(self.config, subfolder=self.part, local_files_only=True)
            try:
                convert = library.SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
                made = convert(config=dict(config), checkpoint={**given})
            except Exception:  # already in diffusers' names, or one that looks at values: it will say so itself
                made = given
        dtype = dtype or torch.float32
        found = [tensor for tensor in made.values() if isinstance(tensor, torch.Tensor)]
        copied = [tensor for tensor in found if tensor.dtype != dtype or _storage(tensor) not in stored]
        del kept  # until here, so that no other storage is at the place of one of them
        return sum(tensor.numel() * dtype.itemsize for tensor in copied)

    def _require(self, nbytes: int, what: str) -> None:
        if nbytes > self.available:
            raise NoMemory(
                f"the library takes {nbytes / 1e9:.1f} GB of memory to open {what} from the single file; "
                f"{self.available / 1e9:.1f} GB are available"
            )


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
