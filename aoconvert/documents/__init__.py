"""What the commands print with ``--json``: the JSON Schemas in ``manifests/``, one for each document.

``python -m aoconvert.documents`` writes them. Tests hold what the commands really print against them, in both
directions: every key that is printed is described here.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel

from aoconvert.documents.base import ErrorDocument
from aoconvert.documents.conversion import (
    ConvertDocument,
    DemoDocument,
    MigrateDocument,
    PlanDocument,
    QuantizeDocument,
    RepackDocument,
)
from aoconvert.documents.publishing import (
    BenchDocument,
    CardDocument,
    EvalDocument,
    PlotDocument,
    PushDocument,
    VerifyDocument,
)
from aoconvert.documents.reading import CacheDocument, DiffDocument, EnvDocument, InspectDocument, SchemeDocument
from aoconvert.documents.releases import ReleaseDocument, ReleaseEvent, ReleaseJobDocument
from aoconvert.releasing.release_file import ReleaseFile

FOLDER = Path("manifests")

DOCUMENTS: dict[str, type[BaseModel]] = {
    "error": ErrorDocument,
    "plan": PlanDocument,
    "quantize": QuantizeDocument,
    "verify": VerifyDocument,
    "bench": BenchDocument,
    "plot": PlotDocument,
    "eval": EvalDocument,
    "card": CardDocument,
    "push": PushDocument,
    "release": ReleaseDocument,
    "release-event": ReleaseEvent,
    "release-file": ReleaseFile,
    "release-job": ReleaseJobDocument,
    "inspect": InspectDocument,
    "diff": DiffDocument,
    "convert": ConvertDocument,
    "repack": RepackDocument,
    "migrate": MigrateDocument,
    "scheme": SchemeDocument,
    "env": EnvDocument,
    "cache": CacheDocument,
    "demo": DemoDocument,
}
"""Name → document; ``schemes --json`` is a list of ``scheme``."""


_TITLES = {
    "release-file": "a file of aoconvert release, version 1",
    "release-event": "a line of aoconvert release --json, version 1",
    "release-job": "the plan of aoconvert release --engine hf-jobs --json, version 1",
}


def schema_path(name: str) -> Path:
    """Where a document's schema lies."""
    return FOLDER / f"{name}.v1.schema.json"


def json_schema(name: str) -> str:
    """The JSON Schema text of a document."""
    schema = DOCUMENTS[name].model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = _TITLES.get(name, f"aoconvert {name} --json, version 1")
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
