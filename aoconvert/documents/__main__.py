"""``python -m aoconvert.documents``: write the schemas."""

from aoconvert.documents import DOCUMENTS, json_schema, schema_path

for name in DOCUMENTS:
    schema_path(name).write_text(json_schema(name), encoding="utf-8")
