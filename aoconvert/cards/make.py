"""A card out of a folder: everything that a template shows, in the order in which it is found out."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from pathlib import Path
from typing import Any

from aoconvert.cards import template
from aoconvert.cards.card import Card, CardOptions
from aoconvert.cards.components import describe
from aoconvert.cards.costs import read_costs
from aoconvert.cards.exceptions import FOLDED_FROM, apart
from aoconvert.cards.layers import layers
from aoconvert.cards.licenses import show_license
from aoconvert.cards.limits import hardware, limits
from aoconvert.cards.markdown import is_page
from aoconvert.cards.metadata import front_matter, is_repo_id, to_yaml
from aoconvert.cards.picture import draw
from aoconvert.cards.proof import Proof, prove
from aoconvert.cards.quality import describe_quality, output_errors
from aoconvert.cards.reproduce import make_again, parse_requirements, pin
from aoconvert.cards.siblings import describe_siblings
from aoconvert.checkpoint import manifest as manifests
from aoconvert.checkpoint.checkpoint import Checkpoint, from_manifest
from aoconvert.checkpoint.load_code import code_device, load_code
from aoconvert.checkpoint.manifest import PICTURE_NAME, FileEntry, LoraEntry, Manifest
from aoconvert.checkpoint.report import Strategy
from aoconvert.checkpoint.seals import seal
from aoconvert.checkpoint.usage import usage_code, usage_packages
from aoconvert.errors import UsageError
from aoconvert.formats.registry import FORMATS
from aoconvert.humanize import argument
from aoconvert.models import identify
from aoconvert.planning.overwriting import tidy
from aoconvert.sources.folder import FolderSource

_HUB = "https://huggingface.co"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = (*(suffix for entry in FORMATS.values() for suffix in entry.suffixes), ".msgpack")


def render(folder: Path, options: CardOptions, *, repo_id: str | None = None, revision: str | None = None) -> Card:
    """The card of a checkpoint: the same manifest, report and options give the same bytes.

    Args:
        folder: the checkpoint.
        options: what the user decides.
        repo_id: where it will be published; without it the code on the card opens the folder.
        revision: the branch, where it is not the default one.

    Raises:
        UsageError: metadata that the Hub does not know, a repo id that is none, or a template that fails.
        SourceError: no manifest, or not a valid one.
    """
    tidy(folder)
    if repo_id is not None and not is_repo_id(repo_id):
        raise UsageError(f"{repo_id!r} is not a valid repo id", hint="a repo id is user/name")
    manifest = manifests.load(folder)
    target = from_manifest(folder, manifest)
    library = "transformers" if target.kind == "transformers" else "diffusers"
    front, warnings = front_matter(manifest, library, options.license, options.metadata)
    header = to_yaml(front)
    outputs = output_errors(folder, manifest)
    pairs = zip(manifest.components, outputs, strict=True)
    picture = draw([(entry.name, layers(entry, errors)) for entry, errors in pairs])
    proof = prove(folder, target, manifest)
    parts = [describe(entry) for entry in manifest.components]
    sizes = _sizes(manifest)
    siblings, siblings_picture = describe_siblings(folder) or (None, None)
    values = {
        **_what(target, manifest, folder, repo_id),
        "license": show_license(manifest, front),
        "license_url": front.get("license_link") if is_page(front.get("license_link")) else None,
        "picture": PICTURE_NAME if picture is not None else None,
        "pictured_outputs": any(outputs),
        "code": _code(target, manifest, proof, repo_id or str(folder), hub=repo_id is not None, revision=revision),
        "proof": _proof(proof),
        "components": parts,
        "sizes": sizes,
        "quality": describe_quality(
            folder, repo_id or argument(str(folder)), sizes["total"]["bytes_in"], sizes["total"]["bytes_out"]
        ),
        "siblings": siblings,
        "costs": read_costs(folder, manifest, repo_id or argument(str(folder))),
        "hardware": hardware(manifest.components),
        "needs": list(dict.fromkeys((item["package"], item["range"]) for part in parts for item in part["loads_with"])),
        "limits": limits(target, manifest, proof.strategy),
        "verify": shlex.join(
            ["aoconvert", "verify", repo_id or argument(str(folder)), *(["--revision", revision] if revision else [])]
        ),
        **_origin(manifest),
    }
    text = f"{header}\n{template.render(options.template, values).strip()}\n"
    return Card(seal(text), picture, warnings, siblings_picture)


def _what(target: Checkpoint, manifest: Manifest, folder: Path, repo_id: str | None) -> dict[str, Any]:
    schemes = list(dict.fromkeys(name for entry in manifest.components for name in entry.scheme.split("+")))
    name = (repo_id or manifest.source.repo_id or "").rpartition("/")[2]
    title = name if repo_id else f"{name or target.class_name} {', '.join(schemes)}"
    return {
        "title": title,
        "repo_id": repo_id,
        "place": repo_id or str(folder),
        "kind": target.kind,
        "class_name": target.class_name,
        "schemes": schemes,
    }


def _code(
    target: Checkpoint, manifest: Manifest, proof: Proof, place: str, *, hub: bool, revision: str | None
) -> dict[str, Any]:
    usage = usage_code(target, place, revision=revision)
    names = _packages(target, proof.strategy)
    return {
        "load": load_code(target, place, proof.strategy, hub=hub, revision=revision),
        "usage": usage,
        "to_device": f"{'pipe' if target.kind == 'pipeline' else 'model'}.to({code_device(target)!r})",
        "strategy": proof.strategy,
        "packages": names,
        "install": _install(manifest, names, proof, usage_packages(usage)),
    }


def _packages(target: Checkpoint, strategy: Strategy) -> list[str]:
    """What the code imports, and what the libraries need for it."""
    libraries = {part.library for part in target.parts}
    if target.kind == "pipeline":
        libraries |= {"diffusers", *(part.library for part in identify(FolderSource(target.folder)).components)}
    names = [*(["torchao"] if target.imports else []), "torch", *sorted(libraries)]
    if "diffusers" in libraries or strategy == "assign":
        names.append("accelerate")
    return names


def _install(manifest: Manifest, names: list[str], proof: Proof, more: tuple[str, ...]) -> str:
    """``pip install`` for a shell, with the versions that opened the checkpoint, or else wrote it; ``more`` without."""
    opened = dict(proof.versions) if proof.ok else {}
    words = [pin(name, opened.get(name) or getattr(manifest.environment, name)) for name in names]
    for entry in manifest.components:
        words += [
            f"{item.name}{item.specifier}"
            for item in parse_requirements(entry.layout.requires)
            if item.name not in names
        ]
    words += more
    return "pip install " + " ".join(shlex.quote(word) for word in dict.fromkeys(words))


def _proof(proof: Proof) -> dict[str, Any]:
    return {
        "ok": proof.ok,
        "reason": proof.reason,
        "date": proof.date,
        "device": proof.device,
        "versions": [{"name": name, "version": version} for name, version in proof.versions],
        "checks": [{"name": check.name, "status": check.status, "detail": check.detail} for check in proof.checks],
        "example": proof.example,
        "forward": proof.forward,
        "not_run": proof.not_run,
        "device_code": repr(proof.device),
    }


def _sizes(manifest: Manifest) -> dict[str, Any]:
    """Bytes of tensors before and after, of each component and of a pipeline's other parts, and all together."""
    rows: list[dict[str, Any]] = []
    for entry in manifest.components:
        totals = entry.totals
        rows.append(
            {
                "name": entry.name or entry.class_name,
                "scheme": entry.scheme,
                "bytes_in": totals.bytes_in,
                "bytes_out": totals.bytes_out,
                "bits_in": 8 * totals.bytes_in / totals.parameters if totals.parameters else None,
                "bits_out": totals.bits_per_weight,
            }
        )
    others: defaultdict[str, int] = defaultdict(int)
    for part in manifest.unquantized:
        others[part.path or part.name] = sum(file.size for file in part.files)
    for file in manifest.copied:
        folder, slash, _ = file.path.rpartition("/")
        if slash and file.path.endswith(_WEIGHTS):
            others[folder] += file.size
    rows += [
        {"name": name, "scheme": None, "bytes_in": total, "bytes_out": total, "bits_in": None, "bits_out": None}
        for name, total in sorted(others.items())
    ]
    total = {key: sum(row[key] for row in rows) for key in ("bytes_in", "bytes_out")}
    return {"rows": rows, "total": total}


def _origin(manifest: Manifest) -> dict[str, Any]:
    source, run = manifest.source, manifest.run
    repo = source.repo_id if is_repo_id(source.repo_id) else None
    config = source.config.repo_id if source.config is not None else None
    commit = source.revision if source.revision and _COMMIT.fullmatch(source.revision) else None
    versions = manifest.environment.model_dump(include={*manifests.EnvironmentEntry.model_fields} - {"device"})
    return {
        "source": {
            "name": source.repo_id,
            "url": f"{_HUB}/{repo}" if repo else None,
            "revision": source.revision,
            "revision_url": f"{_HUB}/{repo}/tree/{commit}" if repo and commit else None,
            "files": _files(source.files),
            "loras": [_lora(lora) for lora in source.loras],
            "file": source.files[0].path if source.kind == "file" and source.files else None,
            "config": config if is_repo_id(config) else None,
            "config_url": f"{_HUB}/{config}" if is_repo_id(config) else None,
        },
        "files": _files([file for file in manifest.files() if file not in manifest.copied]),
        "copied": len(manifest.copied),
        "command": make_again(manifest),
        "apart": (rows := apart(manifest)),
        "apart_folded": len(rows) > FOLDED_FROM,
        "date": run.started[:10],
        "versions": [{"name": name, "version": version} for name, version in versions.items()],
        "device_name": manifest.environment.device.name,
        "on_gpu": manifest.environment.device.type != "cpu",
        "elsewhere": sum(t.device is not None for entry in manifest.components for t in entry.tensors),
        "tool": f"{manifest.tool.name} {manifest.tool.version}",
    }


def _lora(lora: LoraEntry) -> dict[str, Any]:
    repo = lora.repo_id if is_repo_id(lora.repo_id) else None
    commit = lora.revision if repo and lora.revision and _COMMIT.fullmatch(lora.revision) else None
    return {
        "name": repo or lora.path.rpartition("/")[2],
        "url": f"{_HUB}/{repo}" if repo else None,
        "commit": commit,
        "weight": lora.weight,
        "tensors": lora.tensors,
        "sha256": lora.sha256,
    }


def _files(entries: list[FileEntry]) -> list[dict[str, Any]]:
    weights = [file for file in entries if file.path.endswith(_WEIGHTS)]
    return [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in weights]
