"""The front matter of a card: what the source's card says and still holds, what the user sets, and what is new."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from aoconvert.cards import licenses
from aoconvert.cards.hub_names import FORMAT_TAGS, KEYS, LICENSES, RELATIONS, TASKS
from aoconvert.checkpoint.manifest import PLAIN, Manifest, SourceCard
from aoconvert.errors import UsageError
from aoconvert.schemes.names import normalize
from aoconvert.schemes.table import catalogue

_LICENSE_NAME = re.compile(r"[a-z0-9-.]+")  # the Hub's own pattern
_SPEC = "https://huggingface.co/docs/hub/model-cards"
_LICENSE_TAGS = LICENSES - {"other", "unknown", "cc"}  # words of their own, too
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_]\w{1,20})*|code|multilingual", re.ASCII)
_TAG = re.compile(r"[\w.+-][\w.+ -]{0,98}|arxiv:[\w.-]{1,40}")  # with a colon the Hub means its own kinds of tags


def parse_metadata(items: Iterable[str]) -> dict[str, Any]:
    """``KEY=VALUE`` of ``--set-metadata``; a value is a YAML scalar or list, and nothing leaves the key out.

    Raises:
        UsageError: not of that form, or a key or value that the Hub does not know.
    """
    import yaml  # type: ignore[import-untyped]

    found: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"--set-metadata {item!r} is not KEY=VALUE")
        # texts stay as they are written: YAML reads the language "no" as false, and a version as a number
        loader = yaml.BaseLoader if KEYS.get(key) in ("text", "texts") else yaml.SafeLoader
        try:
            value = yaml.load(text, Loader=loader)  # both make plain values only
        except yaml.YAMLError as error:
            raise UsageError(f"--set-metadata {key}: {text!r} is not YAML", hint="quote the value") from error
        value = None if value in ("", "null", "~") else value
        found[key] = check(key, value)
    return found


def check(key: str, value: Any) -> Any:
    """A value of the front matter, if the Hub knows the key and takes such a value; ``None`` is always taken.

    Raises:
        UsageError: it does not.
    """
    kind = KEYS.get(key)
    if kind is None:
        close = difflib.get_close_matches(key.lower().replace("-", "_"), KEYS, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}? The keys are in {_SPEC}" if close else f"the keys are in {_SPEC}"
        raise UsageError(f"the Hub's model cards have no metadata key {key!r}", hint=hint)
    if kind == "nested":
        raise UsageError(f"{key} is a nested value, which KEY=VALUE cannot express", hint="write it into README.md")
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    wanted: dict[str, tuple[type, ...]] = {"flag": (bool,), "number": (int, float)}
    right = all(
        isinstance(item, wanted.get(kind, (str,))) and (kind == "flag" or not isinstance(item, bool)) for item in items
    )
    if not right or (isinstance(value, list) and kind != "texts"):
        what = {"flag": "true or false", "number": "a number", "text": "a text", "texts": "a text or a list of texts"}
        raise UsageError(f"metadata {key} takes {what[kind]}, not {value!r}")
    if any(isinstance(item, str) and not (item.strip() and item.isprintable()) for item in items):
        raise UsageError(f"metadata {key}: {value!r} is empty, or contains unprintable characters")
    if key == "base_model_relation" and value not in RELATIONS:
        raise UsageError(f"base_model_relation is one of {', '.join(RELATIONS)}, not {value!r}")
    return value


def front_matter(
    manifest: Manifest, library: str, license: str | None, given: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The values of the front matter, and what its reader will miss.

    Args:
        manifest: of the checkpoint.
        library: that opens it.
        license: where the source's card names none.
        given: in place of anything.

    Raises:
        UsageError: a key or value that the Hub does not know.
        PlanError: a licence that contradicts the source's.
    """
    card = manifest.source.card or SourceCard()
    base = manifest.source.repo_id if is_repo_id(manifest.source.repo_id) else None
    adapters = [lora.repo_id for lora in manifest.source.loras if is_repo_id(lora.repo_id)]
    known = licenses.of_source(manifest)
    terms = known.terms if license is None else licenses.read_chosen(known, check("license", license))
    schemes = [
        name for part in manifest.components for name in part.scheme.split("+") if _like(_TAG, name) and name != PLAIN
    ]
    values: dict[str, Any] = {
        "base_model": [*([base] if base else []), *adapters] if adapters else base,
        "base_model_relation": None,
        "library_name": library,
        "pipeline_tag": card.pipeline_tag if card.pipeline_tag in TASKS else None,
        **terms,
        "language": [code for code in card.language if _like(_LANGUAGE, code)] or None,
        # diffusers reads it to find the pipelines that this one is connected with (``CONNECTED_PIPES_KEYS``)
        "prior": [repo for repo in card.prior if is_repo_id(repo)] or None,
    }
    changed = {key: check(key, value) for key, value in given.items()}
    if "license" in changed and license is None:  # the source's name and link belong to the source's licence
        values |= {"license_name": None, "license_link": None}
    values |= {key: value for key, value in changed.items() if key != "tags"}
    if values["base_model"] and "base_model_relation" not in changed:
        values["base_model_relation"] = "quantized"  # else the Hub guesses, and may list it as a finetune
    said = [*licenses.deviations(known, values), *_other_base(base, values)]
    tags = _as_list(changed["tags"]) if "tags" in changed else _still_true(card.tags, values["license"])
    values["tags"] = list(dict.fromkeys([*tags, *(["torchao"] if schemes else []), *schemes, "aoconvert"]))
    return values, (*said, *_warn_missing(values))


def _other_base(source: str | None, values: Mapping[str, Any]) -> Iterable[str]:
    """What a base model that was given says otherwise than the manifest."""
    base = values["base_model"]
    if source is not None and source not in _as_list(base):
        yield f"base_model {base or 'left out'}: the weights are those of {source}"
    if base and values["base_model_relation"] != "quantized":
        yield f"base_model_relation {values['base_model_relation']}: the weights are quantized, and nothing else"


def to_yaml(values: Mapping[str, Any]) -> str:
    """The front matter with its fences; what is ``None`` is left out."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**values).to_yaml()}\n---\n"


def is_repo_id(text: str | None) -> bool:
    """Whether it can be a repo on the Hub: only such a name becomes a link or a base model."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in __all__

    try:
        validate_repo_id(text or "")
    except HFValidationError:
        return False
    return text is not None and text.isascii() and text.isprintable()


def _warn_missing(values: Mapping[str, Any]) -> Iterable[str]:
    license, name = values.get("license"), values.get("license_name")
    if license is None:
        yield "the licence is unknown: the source's card names none; give it with --license"
    elif license not in LICENSES:
        close = difflib.get_close_matches(str(license).lower(), LICENSES, n=1)
        yield f"licence {license!r} is not on the Hub's list" + (f"; did you mean {close[0]}?" if close else "")
    elif license == "other" and not (name and values.get("license_link")):
        yield "licence 'other' needs a name and a link: --set-metadata license_name=… and license_link=…"
    if name is not None and not _LICENSE_NAME.fullmatch(name):
        yield f"the Hub does not accept the license_name {name!r}: use lower-case letters, digits, '-' and '.' only"
    if values.get("pipeline_tag") not in (None, *TASKS):
        close = difflib.get_close_matches(str(values["pipeline_tag"]), TASKS, n=1)
        yield f"the Hub has no task {values['pipeline_tag']!r}" + (f"; did you mean {close[0]}?" if close else "")


def _still_true(tags: Iterable[str], license: str | None) -> list[str]:
    """The source's tags that hold for the result: not formats, quantization, other licences, the Hub's marks."""
    schemes = {normalize(name) for entry in catalogue() for name in (entry.name, *entry.aliases)}
    return [
        tag
        for tag in tags
        if _TAG.fullmatch(tag)
        and tag.lower() not in FORMAT_TAGS
        and normalize(tag) not in schemes
        and (tag.lower() not in _LICENSE_TAGS or tag.lower() == license)
    ]


def _like(pattern: re.Pattern[str], value: str | None) -> str | None:
    """A manifest's value, if it looks like one; what does not is left out."""
    return value if value is not None and pattern.fullmatch(value) else None


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
