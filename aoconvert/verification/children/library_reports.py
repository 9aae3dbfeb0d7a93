"""What a library says of opening a model, and what it leaves out of that. For ``library_child`` alone."""

from __future__ import annotations

import gc
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LARGE = 1 << 27  # elements
REPORT = ("missing_keys", "unexpected_keys", "mismatched_keys")


def report_of(cls: Any, folder: Path, **options: Any) -> dict[str, list[str]] | None:
    """The library's loading report of one part; ``None`` where its class gives none."""
    if not hasattr(cls, "from_pretrained") or not (hasattr(cls, "from_config") or hasattr(cls, "_from_config")):
        return None  # of a list of models, too
    model, report = cls.from_pretrained(str(folder), output_loading_info=True, local_files_only=True, **options)
    large = sum(tensor.numel() for tensor in model.parameters()) > LARGE
    del model
    if large:  # its modules refer to each other, and what of it is not mapped would stay
        gc.collect()
    return {key: sorted(str(name) for name in report.get(key) or ()) for key in REPORT}


def compare_reports(part: dict[str, Any], source: Any, result: Any) -> Iterator[tuple[str, bool]]:
    """Compare the loading reports: each line says what differs, and whether it speaks for another model.

    What is missing, unexpected and mismatched must agree.
    """
    if source is None or result is None:
        return
    excused = {"missing_keys": set(part["missing"]), "unexpected_keys": set(part["dropped"])}
    for key in REPORT:
        word = key.removesuffix("_keys")
        for name in sorted(set(result[key]) - set(source[key]) - excused.get(key, set())):
            yield f"the library reports {name} as {word} in the result, but not in the source", True
        for name in sorted(set(source[key]) - set(result[key]) - excused.get(key, set())):
            yield f"the library reports {name} as {word} in the source, but not in the result", False


def find_ignored(model: Any, names: set[str]) -> set[str]:
    """Those of the names that the library leaves out of its report, as the class wants it."""
    if hasattr(model, "_adjust_missing_and_unexpected_keys"):  # transformers; old tables of positions are in its code
        report = SimpleNamespace(missing_keys=set(), unexpected_keys=set(names))
        model._adjust_missing_and_unexpected_keys(report)
        return not_renamed(model, {name for name in names if name not in report.unexpected_keys})
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def not_renamed(model: Any, names: set[str]) -> set[str]:
    """Those of the names in a file that transformers has no other name for in the model (``weight_g``, a prefix)."""
    try:
        mapping = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
        loading = importlib.import_module("transformers.core_model_loading")
    except ImportError:  # a version without such a table
        return names
    kinds = [
        [item for item in mapping if isinstance(item, kind)]
        for kind in (loading.WeightRenaming, loading.WeightConverter)
    ]
    state, prefix = model.state_dict(), model.base_model_prefix
    return {name for name in names if loading.rename_source_key(name, *kinds, prefix, state)[0] not in state}
