"""The golden conversions, one or more for each path through the writers, and what is kept of each: hashes.

Kept are the SHA-256 of every file of the result, and of what the commands say of it: the manifest, ``plan --json``,
``inspect --json`` and the model card. Sentences for people are hashed apart from facts. Not compared is what belongs to
the machine and the day: ``run`` and ``environment`` in the manifest, versions of ``tool`` and
``written_by``, the memory that a plan needs, whether a layout can run here, and the card's line "Made … on …".
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from golden.sources import SOURCES

from aoconvert.cli.main import main

Record = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Conversion:
    """A run of ``quantize`` on a source, and maybe one of ``repack`` on its result.

    ``recipe`` is the text of a recipe, ``cpu`` what ``torch.backends.cpu.get_cpu_capability`` has to say where the
    bytes depend on it.
    """

    source: str
    options: str
    recipe: str | None = None
    repack: str | None = None
    cpu: str | None = None


_MIXED = """
[[rule]]
match = 're:transformer_blocks\\.0\\..*'
scheme = "float8wo"

[[rule]]
match = 're:.*\\.attn1\\..*'
scheme = "int8dq"

[[rule]]
match = 're:.*norm.*'
scheme = "skip"
"""

CONVERSIONS: Mapping[str, Conversion] = {
    "cogvideox-recipe": Conversion("cogvideox", "--scheme int8wo", recipe=_MIXED),
    "flux-fused": Conversion("flux", "--scheme int8wo --fuse-qkv"),
    "pixart-original-files": Conversion("pixart", "--scheme float8wo --keep-original-files"),
    "sd3-components": Conversion("sd3", "--component transformer=int8dq --component text_encoder_3=float8wo"),
    "wan-float8dq": Conversion("wan", "--scheme float8dq"),
    "flux-component-only": Conversion("flux", "--scheme float8dq_row --component transformer --component-only"),
    "llama-tied": Conversion("llama-tied", "--scheme int8wo"),
    "llama-untie": Conversion("llama-tied", "--scheme int8wo --untie --no-default-skips --include-embeddings"),
    "llama-shards-out": Conversion("llama", "--scheme int8wo --max-shard-size 12KB"),
    "llama-shards-in": Conversion("llama-shards", "--scheme int8dq --dtype float16 --skip re:.*down_proj.*"),
    "llama-bin": Conversion("llama-bin", "--scheme float8wo_e5m2"),
    "llama-bin-shards": Conversion("llama-bin-shards", "--scheme int8wo --dtype float32"),
    "llama-unknown": Conversion("llama-unknown", "--scheme int8wo"),
    "llama-drop-unknown": Conversion("llama-unknown", "--scheme int8wo --drop-unknown"),
    "llama-missing": Conversion("llama-without-a-norm", "--scheme int8wo --allow-missing model.norm.weight"),
    "glm-prediction": Conversion("glm-prediction", "--scheme int8wo --min-quantized 0"),
    "mixtral-int8wo": Conversion("mixtral", "--scheme int8wo"),
    "mixtral-float8dq-row": Conversion("mixtral", "--scheme float8dq_row"),
    "opt-embeddings": Conversion("opt", "--scheme int8wo --include-embeddings --dtype auto"),
    "t5-int4dq": Conversion("t5", "--scheme int4dq --group-size 32"),
    "llama-int4-cuda": Conversion("llama-wide", "--scheme int4wo --group-size 32 --layout-device cuda"),
    "llama-int4-xpu": Conversion("llama-wide", "--scheme int4wo --group-size 32 --layout-device xpu"),
    "llama-int4-cpu": Conversion("llama-wide", "--scheme int4wo --group-size 32 --layout-device cpu", cpu="AVX512"),
    "llama-int4-hqq": Conversion(
        "llama-wide", "--scheme int4wo --layout-device cuda --set int4_choose_qparams_algorithm=hqq"
    ),
    "llama-repack": Conversion(
        "llama-wide", "--scheme int4wo --group-size 64 --layout-device cpu", repack="cuda", cpu="AVX512"
    ),
    "llama-nvfp4": Conversion("llama-wide", "--scheme nvfp4"),
    "llama-mxfp8": Conversion("llama-wide", "--scheme mxfp8"),
    "llama-float8dq-block": Conversion("llama-wide", "--scheme float8dq_block"),
    "llama-auto": Conversion("llama-wide", "--scheme auto --target-bits 9 --candidates int8wo,float8wo,nvfp4wo"),
    "llama-large": Conversion("llama-large", "--scheme int8wo --min-quantized 0"),
    "llama-large-embeddings": Conversion("llama-large", "--scheme int8wo --min-quantized 0 --include-embeddings"),
}

_SENTENCES = {"reason", "unconfirmed", "warnings", "advice", "problems", "why", "note"}
_ELSEWHERE = {"run", "environment", "version", "host_peak_bytes", "loads_here", "why_not"}
_MADE = re.compile(r"^- Made .*$", re.MULTILINE)  # the date, the device, the versions
_SEAL = re.compile(r"sha256 of all above: [0-9a-f]{64}")  # of that line, too


class Golden:
    """Makes conversions in a folder; sources are built once and shared.

    ``keep`` is a folder for the documents that are hashed, by conversion.
    """

    def __init__(self, root: Path, keep: Path | None = None) -> None:
        self.root, self.keep = root, keep

    def make(self, name: str) -> Record:
        """``files`` (path → SHA-256) and ``documents`` (title → SHA-256) of a conversion.

        Raises:
            AssertionError: a command failed.
        """
        conversion = CONVERSIONS[name]
        self._build(conversion.source)
        with contextlib.chdir(self.root):
            for output in ("out", "packed"):
                shutil.rmtree(output, ignore_errors=True)
            return self._make(name, conversion)

    def _build(self, source: str) -> None:
        if not (self.root / source).exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                SOURCES[source](self.root / source)

    def _make(self, name: str, conversion: Conversion) -> Record:
        arguments = [conversion.source, *conversion.options.split(), "--device", "cpu", "--output", "out"]
        if conversion.recipe is not None:
            Path("recipe.toml").write_text(conversion.recipe, encoding="utf-8")
            arguments += ["--recipe", "recipe.toml"]
        texts = facts("plan", json.loads(call("plan", *arguments, "--json")))
        call("quantize", *arguments)
        outputs = ["out"]
        if conversion.repack is not None:
            call("repack", "out", "--layout-device", conversion.repack, "--output", "packed")
            outputs.append("packed")
        files: dict[str, str] = {}
        for output in outputs:
            texts |= facts(f"{output} inspect", json.loads(call("inspect", output, "--json")))
            call("card", output, "--write")
            for path in sorted(file for file in Path(output).rglob("*") if file.is_file()):
                if path.name == "aoconvert.json":
                    texts |= facts(f"{output} manifest", json.loads(path.read_text(encoding="utf-8")))
                elif path.name == "README.md":
                    texts[f"{output} card"] = _SEAL.sub("sealed", _MADE.sub("- Made", path.read_text(encoding="utf-8")))
                else:
                    files[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        self._write(name, texts)
        return {"files": files, "documents": {title: _sha256(text) for title, text in texts.items()}}

    def _write(self, name: str, texts: Mapping[str, str]) -> None:
        if self.keep is not None:
            folder = self.keep / name
            folder.mkdir(parents=True, exist_ok=True)
            for title, text in texts.items():
                (folder / f"{title}.txt").write_text(text, encoding="utf-8")


def call(*arguments: str) -> str:
    """What a command prints on stdout."""
    printed, said = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            main(list(arguments))
    except SystemExit as ended:
        assert not ended.code, f"aoconvert {' '.join(arguments)}: {printed.getvalue()}{said.getvalue()}"
    return printed.getvalue()


def facts(title: str, document: Any) -> dict[str, str]:
    """A document's facts and its sentences, as text; keys stay in their order."""
    sentences: list[str] = []
    rest = _without_sentences(document, "", sentences)
    return {title: json.dumps(rest, indent=1), f"{title}, sentences": "\n".join(sentences)}


def _without_sentences(value: Any, at: str, sentences: list[str]) -> Any:
    if isinstance(value, list):
        return [_without_sentences(item, f"{at}.{number}", sentences) for number, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        if key in _SENTENCES:
            sentences.append(f"{at}.{key} {json.dumps(item)}")
        elif key == "written_by":
            kept[key] = item["how"] if item is not None else None
        else:
            kept[key] = None if key in _ELSEWHERE else _without_sentences(item, f"{at}.{key}", sentences)
    return kept


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def differences(found: Record, wanted: Record) -> list[str]:
    """The files and documents that are not what they should be."""
    return [
        f"{title} {'differs' if title in found[kind] and title in wanted[kind] else 'is missing or new'}"
        for kind in wanted
        for title in sorted(found[kind].keys() | wanted[kind].keys())
        if found[kind].get(title) != wanted[kind].get(title)
    ]
