"""The check ``library``: the library opens the source and the result, and both must be the same model.

What the two may differ in is what the manifest states: the dtype, quantized tensors within their SQNR, projections that
were fused, ties that were taken apart, tensors that were left out or left to the library. Nothing of the planning and
reading that made the result has a say in it; see ``children/library_child.py``.
"""

from __future__ import annotations

import json
import posixpath
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aoconvert.checkpoint.checkpoint import Checkpoint, Part
from aoconvert.checkpoint.load_code import load_code
from aoconvert.checkpoint.manifest import ComponentEntry, Manifest
from aoconvert.checkpoint.report import Status, some
from aoconvert.errors import SourceError
from aoconvert.humanize import plural
from aoconvert.memory import available_bytes
from aoconvert.models import identify
from aoconvert.models.lora_files import LoraFile, read_loras
from aoconvert.options import DEFAULT_HUB, HubOptions
from aoconvert.rewriting.compare_old import is_old
from aoconvert.sources import Source
from aoconvert.sources.bundle import INDEX, BundleSource
from aoconvert.sources.file import CONFIG, FileSource
from aoconvert.verification.original import find_loras
from aoconvert.verification.process import Children, Ended

_VARIANT = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.([^.]+?))?(?:-\d{5}-of-\d{5})?(?:\.([^.]+))?"
    r"\.(?:safetensors|bin)"
)
# what no library opens beside the files that it prefers
_OTHER_FORMATS = re.compile(
    r".*\.(h5|msgpack|onnx|onnx_data|gguf|ot|tflite|mlmodel|ckpt|pth?|npz|pkl|pickle|llamafile|safetensors)|.*\.onnx_data.*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class LibraryFindings:
    """What the check found.

    Attributes:
        status, detail: of the check.
        left: part → quantized tensors whose values the library cannot give back on this machine; ``None`` where it
            compared nothing.
    """

    status: Status
    detail: str
    left: Mapping[str, frozenset[str]] | None = None


def fetch_for_library(source: Source, variant: str | None, folder: str | None) -> None:
    """Have every file of a Hub repo here that the library may open: of each folder's weights one format, one variant.

    Args:
        source: the repo.
        variant: of the weights.
        folder: where the one model is; ``None``: all of a pipeline.
    """
    if not source.is_remote:
        return
    weights: dict[str, dict[tuple[bool, bool], list[str]]] = {}
    wanted = []
    for path in source.files():
        where, name = posixpath.split(path)
        if folder is not None and where != folder and not where.startswith(f"{folder}/" if folder else ""):
            continue
        if match := _VARIANT.fullmatch(name):
            named = match[1] or match[2]
            if named in (None, variant):
                kinds = weights.setdefault(where, {})
                kinds.setdefault((name.endswith(".bin"), named != variant), []).append(path)
        elif not _OTHER_FORMATS.fullmatch(path) and not path.startswith("."):
            wanted.append(path)
    for kinds in weights.values():
        wanted += kinds[min(kinds)]
    source.fetch(wanted)


def compare_by_library(
    target: Checkpoint,
    source: Source,
    children: Children,
    loras: Sequence[str] = (),
    hub: HubOptions = DEFAULT_HUB,
    *,
    trust: bool,
) -> LibraryFindings:
    """Have the library open both, and compare everything by its own names.

    Args:
        target: the checkpoint.
        source: the original.
        children: start the interpreters.
        loras: files of LoRAs that were added.
        hub: how the Hub is asked for the others.
        trust: run code inside the checkpoints.

    Raises:
        VerificationError: the interpreter died, or did not come to an end.
    """
    manifest = target.manifest
    if manifest is None:
        return LibraryFindings("skipped", "without a manifest it is unknown what may differ from the source")
    if (added := find_loras(manifest.source, loras)) is None:
        return LibraryFindings("skipped", "a LoRA was added that is not on the Hub: --lora FILE names it")
    if is_old(source, manifest):
        return LibraryFindings(
            "skipped", "no library of today opens the old checkpoint; numbers compares with what is stored there"
        )
    if isinstance(source, FileSource) and source.place.suffix.lower() == ".gguf":
        return LibraryFindings(
            "skipped", "the library takes all of a GGUF file's values into memory; numbers compares with those of gguf"
        )
    if source.kind == "file" and target.kind != "diffusers" and not isinstance(source, BundleSource):
        return LibraryFindings("skipped", f"the library makes no {target.class_name} of a single file")
    if (other := find_other_model(target, source, manifest)) is not None:
        return LibraryFindings("failed", other, {})
    files = read_loras(added, hub)
    if wrong := [
        str(file.path) for file, of in zip(files, manifest.source.loras, strict=True) if file.sha256 != of.sha256
    ]:
        return LibraryFindings("failed", f"--lora {some(wrong)} is not what was added: its SHA-256 is another one", {})
    folder = None if target.kind == "pipeline" else _source_folder(source, manifest)
    fetch_for_library(source, _variant(manifest), folder)
    with tempfile.TemporaryDirectory(prefix="aoconvert-") as scratch:
        request = _request(target, source, manifest, scratch, trust=trust, loras=files)
        try:
            answers = children.ask("library_child", request, nbytes=target.nbytes + source.nbytes)
        except Ended as error:
            if error.of != "memory":
                raise
            return LibraryFindings("skipped", error.message)
    found = judge(source.label, answers)
    if isinstance(source, FileSource) and found.status == "passed":
        config = f"the config of {source.origin.label}" if source.origin is not None else "the result's own config"
        return replace(found, detail=f"{found.detail}; {source.label} was opened with {config}")
    return found


def originals(target: Checkpoint, source: Source | None, *, trust: bool) -> dict[str, dict[str, Any]]:
    """How the library opens what each quantized part was made of; nothing where that is not known."""
    manifest = target.manifest
    if (
        manifest is None
        or source is None
        or source.kind == "file"
        or manifest.source.loras  # a forward pass needs the whole of it in memory
        or find_other_model(target, source, manifest) is not None
        or is_old(source, manifest)
    ):
        return {}
    fetch_for_library(
        source, _variant(manifest), None if target.kind == "pipeline" else _source_folder(source, manifest)
    )
    root = source.root / (manifest.source.subfolder or "") if target.kind == "pipeline" else source.root
    found = {}
    for part, entry in zip(target.parts, manifest.components, strict=True):
        how = _part(part, entry, source, target, manifest)
        found[part.name] = {key: how[key] for key in ("library", "module", "class_name", "auto_class", "dtype")}
        folder = str(root / how["source_folder"])
        found[part.name] |= {"folder": folder, "variant": _variant(manifest), "trust": trust}
    return found


def find_other_model(target: Checkpoint, source: Source, manifest: Manifest) -> str | None:
    """Why the source cannot be the one that the result was made of, by its configs."""
    try:
        layout = identify(source, manifest.source.subfolder if source.kind != "file" else None)
    except SourceError as error:
        return error.message
    if target.kind == "pipeline" or layout.kind != "pipeline":
        same = layout.kind == target.kind and layout.class_name == target.class_name
    else:  # one component of a pipeline
        same = any(component.class_name == target.class_name for component in layout.components)
    return None if same else f"{source.label} is another model: {layout.class_name}, not {target.class_name}"


def _request(
    target: Checkpoint,
    source: Source,
    manifest: Manifest,
    scratch: str,
    *,
    trust: bool,
    loras: Sequence[LoraFile] = (),
) -> dict[str, Any]:
    root = source.root / (manifest.source.subfolder or "") if target.kind == "pipeline" else source.root
    file = source.place if isinstance(source, FileSource) else None
    if file is not None:
        root = _write_config(source, Path(scratch) / "config")
    folder = str(target.folder.resolve())
    return {
        "source": {
            "folder": str(root),
            "variant": _variant(manifest),
            "file": str(file) if file is not None else None,
        },
        "loras": [{"file": str(lora.place), "weight": lora.weight, "peft": lora.config is not None} for lora in loras],
        "result": {
            "folder": folder,
            "code": load_code(target, folder, "assign", device="cpu") if target.fused else None,
        },
        "kind": target.kind,
        "imports": list(target.imports),
        "trust": trust,
        "left": [str(source.root / item.path) for item in manifest.left_behind],
        "available": available_bytes(),
        "scratch": scratch,
        "parts": {
            part.name: _part(part, entry, source, target, manifest)
            for part, entry in zip(target.parts, manifest.components, strict=True)
        },
    }


def _write_config(source: Source, folder: Path) -> Path:
    """A folder with what a single file needs beside it, as ``from_single_file`` takes it."""
    small = [path for path in source.files() if path != source.weights_file]
    source.fetch([path for path in small if isinstance(source, BundleSource)])
    for path in small:
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if posixpath.basename(path) in (CONFIG, INDEX):
            place.write_text(json.dumps(source.read_json(path)), encoding="utf-8")
        else:
            place.write_bytes(source.local(path).read_bytes())
    return folder


def _part(part: Part, entry: ComponentEntry, source: Source, target: Checkpoint, manifest: Manifest) -> dict[str, Any]:
    quantized = [tensor for tensor in entry.tensors if tensor.action == "quantize"]
    return {
        "library": part.library,
        "module": part.library if part.module is None else f"diffusers.pipelines.{part.module}",
        "class_name": part.class_name,
        "auto_class": part.auto_class,
        "source_folder": part.folder if target.kind == "pipeline" else _source_folder(source, manifest),
        "result_folder": part.folder,
        "dtype": part.dtype,
        "kwargs": dict(part.kwargs),
        "fused": part.fused,
        "untied": "--untie" in shlex.split(manifest.run.command),
        "missing": [item.name for item in entry.missing],
        "dropped": [item.name for item in entry.dropped],
        "tensors": {t.name: {"class_name": t.class_name, "sqnr_db": t.sqnr_db} for t in quantized},
    }


def _source_folder(source: Source, manifest: Manifest) -> str:
    """Where in the source a result that is one model comes from: where its weights were."""
    folders = {posixpath.dirname(file.path) for file in manifest.source.files}
    folder = folders.pop() if len(folders) == 1 else manifest.source.subfolder or ""
    return folder if source.has(posixpath.join(folder, "config.json")) else ""


def _variant(manifest: Manifest) -> str | None:
    """The variant in the names of the weights files that were read."""
    for file in manifest.source.files:
        match = _VARIANT.fullmatch(posixpath.basename(file.path))
        if match and (match[1] or match[2]):
            return match[1] or match[2]
    return None


def judge(label: str, answers: list[dict[str, Any]]) -> LibraryFindings:
    """What the child's answers mean; ``label`` names the source."""
    left: dict[str, set[str]] = {}
    for answer in answers:
        if "left" in answer:
            left.setdefault(answer["part"], set()).add(answer["left"])
    kept = {part: frozenset(names) for part, names in left.items()}
    for answer in answers:
        if "error" in answer:
            return LibraryFindings("failed", f"the library could not open both: {answer['error']}")
        if "skipped" in answer:
            return LibraryFindings("skipped", answer["skipped"])
    found = [answer for answer in answers if "problem" in answer]
    counted = answers[-1]["compared"]
    if found:
        lines = [f"{answer['part']}: {answer['problem']}".removeprefix(": ") for answer in found]
        other = sum(answer["other"] for answer in found)
        whole = other > 1 and other >= counted.get("equal", 0) + counted.get("quantized", 0)
        return LibraryFindings("failed", f"{label} is another model: {some(lines, 2)}" if whole else some(lines), kept)
    return LibraryFindings("passed", _summary(counted, answers[-1]["worst"], kept), kept)


def _summary(counted: dict[str, int], worst: float | None, left: dict[str, frozenset[str]]) -> str:
    parts = [f"{counted.get('equal', 0)} tensors have the source's bits, {counted.get('quantized', 0)} are within"]
    parts[0] += " their SQNR" + (f" (worst {worst:.1f} dB)" if worst is not None else "")
    if counted.get("buffers"):
        parts.append(f"{plural(counted['buffers'], 'buffer')} in no file")
    if counted.get("unused"):
        parts.append(f"{counted['unused']} that the class does not use")
    if counted.get("others"):
        parts.append(plural(counted["others"], "other part"))
    if left:
        parts.append(f"{sum(map(len, left.values()))} have no values on this machine")
    return ", ".join(parts)
