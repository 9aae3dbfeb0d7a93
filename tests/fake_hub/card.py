"""The metadata at the head of a README.md: what ``POST /api/validate-yaml`` says of it.

The YAML is parsed by PyYAML; a key that comes twice is refused, as the Hub's parser does. Of the Hub's schema only the
rules below are known here: https://huggingface.co/docs/hub/model-cards and /repositories-licenses, and messages that
people reported, such as https://github.com/ostris/ai-toolkit/issues/260 ("widget" must be an array).
"""

from __future__ import annotations

import re
from typing import Any

_LICENSES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
    mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other"""
LICENSES = frozenset(_LICENSES.split())
RELATIONS = ("adapter", "finetune", "merge", "quantized")
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# where the block begins and ends, as huggingface_hub.repocard says the Hub has it
_BLOCK = re.compile(r"\s*---(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)", re.DOTALL)
_MODELS = "https://hf.co/models"
_DOCS = "https://huggingface.co/docs/hub/model-cards#model-card-metadata"


def metadata(readme: str) -> Any:
    """What stands between the ``---`` lines, parsed; ``None`` without them. Raises yaml.YAMLError."""
    import yaml  # type: ignore[import-untyped]

    found = _BLOCK.match(readme)
    if found is None:
        return None

    class Loader(yaml.CSafeLoader):  # type: ignore[misc]
        """Refuses a key that comes twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(None, None, "duplicated mapping key", node.start_mark)
            return super().construct_mapping(node, deep)

    return yaml.load(found[1], Loader)  # a subclass of the safe loader


def validate(readme: str, kind: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a card; without errors the Hub takes it."""
    import yaml

    try:
        found = metadata(readme)
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if not found:
        return [], [f"empty or missing yaml metadata in repo card ({_DOCS})"]
    if not isinstance(found, dict):
        return ["YAML Metadata Error: the metadata must be an object"], []
    return (_model_errors(found) if kind == "model" else []), []


def _model_errors(found: dict[str, Any]) -> list[str]:
    errors = []
    for key in ("library_name", "pipeline_tag", "license_name", "license_link", "inference"):
        if key in found and not isinstance(found[key], (str, bool) if key == "inference" else str):
            errors.append(f'"{key}" must be a string')
    for key in ("tags", "datasets", "metrics", "language"):
        if key in found and not _strings(found[key], single=key != "tags"):
            errors.append(f'"{key}" must be an array of strings')
    for value in _listed(found.get("license", [])):
        if value not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
    for number, value in enumerate(_listed(found.get("base_model", []))):
        if not isinstance(value, str) or _REPO_ID.fullmatch(value) is None:
            errors.append(f'"base_model[{number}]" with value "{value}" is not valid. Use a model id from {_MODELS}.')
    if "base_model_relation" in found and found["base_model_relation"] not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    for key in ("model-index", "widget"):
        if key in found and not isinstance(found[key], list):
            errors.append(f'"{key}" must be an array')
    return errors


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _strings(value: Any, *, single: bool) -> bool:
    return (single and isinstance(value, str)) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    )
