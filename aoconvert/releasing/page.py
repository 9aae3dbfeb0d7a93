"""``release.html``: what a release did, for people, in one file that needs nothing else."""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aoconvert.cards.plot import draw_diagrams
from aoconvert.cards.siblings import compare, draw_errors, say_needs
from aoconvert.checkpoint.evaluation import GateResult
from aoconvert.checkpoint.files import file_sha256
from aoconvert.checkpoint.manifest import MANIFEST_NAME, SHEET_NAME
from aoconvert.environment import versions
from aoconvert.files import read_limited, write_whole, writing
from aoconvert.humanize import argument, size
from aoconvert.options.release import ReleaseOptions
from aoconvert.releasing.record import ModelRecord, Record, VariantRecord
from aoconvert.releasing.release_file import ReleaseFile

PAGE_NAME = "release.html"
_TEMPLATE = Path(__file__).parent / "page.html.jinja"
_SHEET_BYTES = 8 << 20  # a larger picture is named, and not put into the page
_STATUS = {
    "planned": "planned",
    "pushed": "published",
    "unchanged": "published before",
    "made": "made, not published",
    "gate_failed": "gate missed",
    "failed": "failed",
    "skipped": "not asked for",
}
_GOOD, _BAD = ("pushed", "unchanged", "made"), ("gate_failed", "failed")


@dataclass(frozen=True)
class Page:
    """What the page is about.

    Attributes:
        path: of the release file.
        found: what is in it.
        options: of the run.
        record: what it did.
        root: folder of the variants.
    """

    path: Path
    found: ReleaseFile
    options: ReleaseOptions
    record: Record
    root: Path

    def write(self) -> None:
        """Write the page beside the record.

        Raises:
            WriteError: disk full, no permission.
        """
        place = self.root / PAGE_NAME
        with writing(place):
            write_whole(place, self.render().encode())

    def render(self) -> str:
        """The page."""
        from jinja2 import Environment, StrictUndefined

        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.filters["size"] = size
        return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(self._values())

    def _values(self) -> dict[str, Any]:
        variants = self.record.variants
        bad = [each for each in variants if each.status in _BAD]
        return {
            "name": self.record.name,
            "ok": self.record.ok,
            "counts": _count(variants),
            "matrix": self._matrix() if len(self.record.models) > 1 else None,
            "problems": [_describe_problem(each) for each in bad],
            "models": [self._describe_model(model) for model in self.record.models],
            "command": self._command(),
            "versions": versions(),
        }

    def _matrix(self) -> dict[str, Any]:
        """Rows of schemes, a cell for each model."""
        models, by_name = self.found.all_models, {each.name: each for each in self.record.variants}
        rows = [
            {
                "title": variant.title,
                "cells": [
                    {"model": model.title, **_describe_status(by_name[self.found.title(model, variant)])}
                    for model in models
                ],
            }
            for variant in self.found.variants
        ]
        return {"models": [model.title for model in models], "rows": rows}

    def _describe_model(self, model: ModelRecord) -> dict[str, Any]:
        variants = [each for each in self.record.variants if each.model == model.name]
        made = [each for each in variants if each.size_bytes is not None]
        figures = {key: compare(made, key) for key in ("kl_mean", "output_sqnr_db", "psnr_mean")}
        diagram = draw_errors(made)
        return {
            "name": model.name,
            "source": model.source,
            "revision": model.revision,
            "kl": bool(figures["kl_mean"]),
            "output": bool(figures["output_sqnr_db"]),
            "psnr": bool(figures["psnr_mean"]),
            "rows": [_describe_variant(each, figures) for each in variants],
            "gates": _describe_gates(variants),
            "picture": _markup(draw_diagrams([diagram])) if diagram is not None else None,
            "sheets": list(self._sheets(variants)),
        }

    def _sheets(self, variants: Iterable[VariantRecord]) -> Iterator[dict[str, Any]]:
        """The pictures of the evaluations of what was made, as addresses that hold them."""
        for each in variants:
            if each.folder is None or not each.metrics:
                continue
            folder = self.root / each.folder
            try:
                if file_sha256(folder / MANIFEST_NAME) != each.manifest_sha256 or not (folder / SHEET_NAME).is_file():
                    continue
                content = read_limited(folder / SHEET_NAME, _SHEET_BYTES)
            except (OSError, ValueError) as error:
                yield {"name": each.name, "uri": None, "problem": getattr(error, "strerror", None) or str(error)}
                continue
            yield {"name": each.name, "uri": f"data:image/png;base64,{base64.b64encode(content).decode()}"}

    def _command(self) -> str:
        """The command that does the same again; the token is not in it."""
        options, plain = self.options, ReleaseOptions()
        words = ["aoconvert", "release", argument(str(self.path))]
        words += [word for pattern in options.only for word in ("--only", pattern)]
        for name in ("owner", "output_root", "engine", "address", "jobs", "cache_dir"):
            value = getattr(options, name)
            if value != getattr(plain, name):
                words += [f"--{name.replace('_', '-')}", str(value)]
        for name in ("skip_push", "fail_fast", "local_files_only"):
            words += [f"--{name.replace('_', '-')}"] if getattr(options, name) else []
        if options.evaluate is not None:
            words.append("--eval" if options.evaluate else "--no-eval")
        return shlex.join(words)


def _markup(svg: str) -> Any:
    """A picture that was drawn here, where every name is escaped."""
    from markupsafe import Markup

    return Markup(svg)


def _count(variants: Sequence[VariantRecord]) -> list[str]:
    """``3 published``, ``1 gate missed``, …"""
    statuses = [each.status for each in variants]
    return [f"{statuses.count(status)} {said}" for status, said in _STATUS.items() if status in statuses]


def _describe_status(each: VariantRecord) -> dict[str, Any]:
    mark = "good" if each.status in _GOOD else "bad" if each.status in _BAD else "open"
    return {
        "anchor": each.name,
        "status": _STATUS[each.status],
        "mark": mark,
        "size": each.size_bytes,
        "bits": each.bits_per_weight,
        "sqnr": each.worst_sqnr_db,
    }


def _describe_variant(each: VariantRecord, figures: dict[str, dict[str, float]]) -> dict[str, Any]:
    url = each.url if each.url is not None and re.fullmatch(r"https?://[\w./%+~=@#:-]+", each.url, re.ASCII) else None
    return {
        **_describe_status(each),
        "name": each.name,
        "scheme": each.scheme,
        "repo": each.repo_id,
        "url": url,
        "commit": each.commit[:12] if each.commit is not None else None,
        "quantized": each.quantized_fraction,
        "kl": figures["kl_mean"].get(each.name),
        "output": figures["output_sqnr_db"].get(each.name),
        "psnr": figures["psnr_mean"].get(each.name),
        "needs": say_needs(each.needs) if each.needs is not None else "",
        "memory": each.needs.memory_bytes if each.needs is not None else None,
    }


def _describe_gates(variants: Sequence[VariantRecord]) -> dict[str, Any] | None:
    """What was required and what was found: a row for each variant that was judged, a column for each gate."""
    names = list(dict.fromkeys(gate.name for each in variants for gate in each.gates))
    if not names:
        return None
    rows = []
    for each in variants:
        by_name = {gate.name: gate for gate in each.gates}
        cells = [(name, _describe_gate(by_name[name]) if name in by_name else None) for name in names]
        if each.gates:
            rows.append({"name": each.name, "cells": cells})
    return {"names": names, "rows": rows}


def _describe_gate(gate: GateResult) -> dict[str, Any]:
    if gate.name in ("verified", "require-forward"):
        return {"found": "yes" if gate.passed else "no", "required": "yes", "passed": gate.passed}
    show = size if gate.name == "max-size" else _show
    found = "none" if gate.value is None else show(gate.value)
    sign = "≤" if gate.name.startswith("max-") else "≥"
    return {"found": found, "required": f"{sign} {show(gate.limit)}", "passed": gate.passed}


def _show(value: float) -> str:
    return f"{value:.4g}"


def _describe_problem(each: VariantRecord) -> dict[str, Any]:
    missed = [(gate.name, _describe_gate(gate)) for gate in each.gates if not gate.passed]
    lines = [f"{name}: {gate['found']}, required: {gate['required']}" for name, gate in missed]
    if each.error is not None:
        lines += each.error.problems or (each.error.message,)
    hint = each.error.hint if each.error is not None else None
    if hint is None and missed:
        hint = "choose another scheme, skip what loses most, or set the gate anew; then run the command below again"
    return {"name": each.name, "anchor": each.name, "status": _STATUS[each.status], "lines": lines, "hint": hint}
