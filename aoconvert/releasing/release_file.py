"""A release file: TOML that says which variants of which models are made, where they go, and what they must reach.

::

    name = "CogVideoX-5b"
    source = "THUDM/CogVideoX-5b"           # or [[models]], each with a source: every model gets every variant
    repo = "{owner}/{model}-{scheme}"       # also {variant}; owner from --owner, or owner = "…" here

    [defaults]                              # options of quantize, by their names there, for all variants
    device = "auto"
    skip = [{ pattern = "re:.*norm.*", reason = "…", source = "https://…" }]

    [[variants]]
    scheme = "int8wo"

    [gates]
    min_quantized = 0.9
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from aoconvert.errors import UsageError
from aoconvert.files import read_limited
from aoconvert.hub.lookups import is_slug
from aoconvert.options.fields import parse_size

_LIMIT = 4 << 20  # bytes
_FIELD = re.compile(r"\{([^{}]*)\}")
_FIELDS = ("owner", "model", "scheme", "variant")
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0)]
_Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_OURS = (".json", ".html", ".svg")  # what lies beside the folders of the variants


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Skip(_Table):
    """Tensors that stay unquantized, and why: data that whoever repeats a release can check."""

    pattern: StrictStr = Field(description="as --skip takes it")
    reason: StrictStr
    source: StrictStr | None = Field(default=None, description="where that was found: an address, or a measurement")


class Choices(_Table):
    """Options of ``quantize``, by their names there."""

    components: list[StrictStr] = Field(default_factory=list, description="as --component takes them")
    skip: list[StrictStr | Skip] = Field(default_factory=list)
    group_size: StrictInt | None = None
    set: dict[str, StrictBool | StrictInt | StrictFloat | StrictStr] = Field(default_factory=dict)
    dtype: StrictStr | None = None
    device: StrictStr | None = None
    layout_device: StrictStr | None = None
    format: StrictStr | None = None
    max_shard_size: StrictStr | StrictInt | None = None
    component_only: StrictBool | None = None
    include_embeddings: StrictBool | None = None
    fuse_qkv: StrictBool | None = None
    min_quantized: _Fraction | None = Field(default=None, description="below it quantize refuses, before any work")
    candidates: list[StrictStr] = Field(default_factory=list)
    min_sqnr: _Number | None = Field(default=None, description="a goal of scheme auto, not a gate")
    target_bits: _Positive | None = None
    target_size: StrictStr | StrictInt | None = None


class Variant(Choices):
    """One checkpoint of the release."""

    name: StrictStr | None = Field(default=None, description="default: the scheme")
    scheme: StrictStr | None = None
    recipe: StrictStr | None = Field(default=None, description="a file beside the release file")
    repo: StrictStr | None = Field(default=None, description="in place of the release's template")
    gates: Gates | None = Field(default=None, description="in place of the release's, gate by gate")

    @property
    def title(self) -> str:
        """Its name within a model."""
        return self.name or self.scheme or Path(self.recipe or "").stem


class Gates(_Table):
    """What a variant must reach to be published; a gate that is absent does not judge."""

    min_quantized: _Fraction | None = Field(default=None, description="fraction of the parameters outside embeddings")
    min_sqnr_db: _Number | None = Field(default=None, description="worst SQNR of a weight, in dB")
    max_size: StrictStr | StrictInt | None = Field(default=None, description="bytes of all weights files, e.g. 12GB")
    require_forward: StrictBool | None = Field(default=None, description="verify ran a forward pass")
    max_kl: _Positive | None = None
    min_agreement: _Fraction | None = None
    max_perplexity_ratio: _Positive | None = None
    min_cosine: _Number | None = None
    min_psnr: _Number | None = None
    max_lpips: _Positive | None = None

    def over(self, others: Gates | None) -> Gates:
        """These, with ``others`` in their place where they say something."""
        return self if others is None else self.model_copy(update=others.model_dump(exclude_none=True))

    @property
    def evaluated(self) -> dict[str, float]:
        """Those that ``eval`` judges, by the names of its options."""
        return self.model_dump(
            exclude_none=True, exclude={"min_quantized", "min_sqnr_db", "max_size", "require_forward"}
        )


class Model(_Table):
    """A source of the release."""

    source: StrictStr = Field(description="a repo, or a folder relative to this file")
    name: StrictStr | None = Field(default=None, description="default: the last part of the source")
    revision: StrictStr | None = Field(default=None, description="of the source; pinned in the results")
    subfolder: StrictStr | None = None
    license: StrictStr | None = Field(default=None, description="in place of the release's")

    @property
    def title(self) -> str:
        """What the repos' names call it."""
        return self.name or self.source.rstrip("/").rpartition("/")[2]


class ReleaseFile(_Table):
    """Models, and the variants that each of them gets."""

    name: StrictStr
    source: StrictStr | None = Field(default=None, description="of the only model, in place of models")
    revision: StrictStr | None = Field(default=None, description="of the source; pinned in the results")
    subfolder: StrictStr | None = None
    models: list[Model] = Field(default_factory=list, description="in place of source: each gets every variant")
    repo: StrictStr = Field(
        default="{owner}/{model}-{scheme}", description="with {owner}, {model}, {scheme}, {variant}"
    )
    owner: StrictStr | None = None
    private: StrictBool | None = None
    collection: StrictStr | None = Field(
        default=None, description="slug or title of a collection that each repo is added to"
    )
    license: StrictStr | None = Field(default=None, description="of the results, where the source's card names none")
    defaults: Choices = Field(default_factory=Choices)
    variants: list[Variant] = Field(min_length=1)
    gates: Gates = Field(default_factory=Gates)

    @property
    def all_models(self) -> list[Model]:
        """The models, also where there is one without a table of its own."""
        if self.source is None:
            return self.models
        return [Model(source=self.source, revision=self.revision, subfolder=self.subfolder)]

    def title(self, model: Model, variant: Variant) -> str:
        """What messages, folders and the record call a variant of a model."""
        return f"{model.title}-{variant.title}" if self.models else variant.title


Variant.model_rebuild()
ReleaseFile.model_rebuild()

# what pydantic adds to the place of a value that may have several types
_KINDS = ("str", "int", "bool", "float", "Skip")
_WRONG = {
    "string_type": "should be text",
    "model_type": "should be a table",
    "dict_type": "should be a table",
    "list_type": "should be a list",
    "too_short": "is empty",
}
_TABLES: Mapping[str, type[_Table]] = {
    "variants": Variant,
    "models": Model,
    "gates": Gates,
    "defaults": Choices,
    "skip": Skip,
}


def load(path: Path) -> ReleaseFile:
    """Read a release file.

    Raises:
        UsageError: it cannot be read, or something in it is wrong: with every problem's place.
    """
    try:
        values = tomllib.loads(read_limited(path, _LIMIT).decode())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}", hint="give a TOML file") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path.name} is not TOML: {error}") from error
    try:
        found = ReleaseFile.model_validate(values)
    except ValidationError as error:
        raise _explain(error, path) from error
    _check(found, path)
    return found


def _explain(error: ValidationError, path: Path) -> UsageError:
    """Everything that is wrong, each with its place in words."""
    problems: dict[str, None] = {}  # a value of several types is wrong for each of them: said once
    for wrong in error.errors():
        keys = [key for key in wrong["loc"] if key not in _KINDS]
        if wrong["loc"][-1:] == ("str",) and isinstance(wrong["input"], dict):
            continue  # an entry of skip: what is wrong with it as a table is said
        problems[f"{path.name}: {_place(keys)}{_what(wrong, keys)}"] = None
    said = UsageError("; ".join(problems))
    said.problems = tuple(problems)
    return said


def _place(keys: list[int | str]) -> str:
    """Where the last key stands: ``variant 2, gates: ``."""
    parts: list[str] = []
    for key in keys[:-1] if isinstance(keys[-1], str) else keys:
        parts.append(key if isinstance(key, str) else f"{parts.pop().removesuffix('s')} {key + 1}")
    return f"{', '.join(parts)}: " if parts else ""


def _what(wrong: Any, keys: list[int | str]) -> str:
    key = keys[-1] if isinstance(keys[-1], str) else "it"
    if wrong["type"] == "missing":
        return f"{key} is missing"
    if wrong["type"] == "extra_forbidden":
        table = next((_TABLES[str(name)] for name in reversed(keys[:-1]) if name in _TABLES), ReleaseFile)
        close = difflib.get_close_matches(key, table.model_fields)
        return f"unknown key {key!r}" + (f", did you mean {close[0]}?" if close else "")
    if wrong["loc"][-1] in _KINDS:
        return f"{key} is of a wrong type"
    return f"{key} {_WRONG.get(wrong['type']) or str(wrong['msg']).replace('Input should', 'should')}"


def _check(found: ReleaseFile, path: Path) -> None:
    if (found.source is None) == (not found.models):
        raise UsageError(f"{path.name} needs a source or [[models]], and not both")
    if found.models and (found.revision or found.subfolder):
        raise UsageError(f"{path.name}: revision and subfolder belong into [[models]], beside its source")
    names = [model.title for model in found.all_models]
    for name in names:
        if _NAME.fullmatch(name) is None:
            raise UsageError(f"{path.name}: {name!r} cannot be a model's name", hint='give it another: name = "…"')
        if names.count(name) > 1:
            raise UsageError(f"{path.name}: two models are called {name}", hint="give one of them a name")
    titles = [variant.title for variant in found.variants]
    folded = [title.lower() for title in titles]  # not every file system tells A from a
    for number, (variant, title) in enumerate(zip(found.variants, titles, strict=True), 1):
        if (variant.scheme is None) == (variant.recipe is None):
            raise UsageError(f"{path.name}: variant {number} needs a scheme or a recipe, and not both")
        if _NAME.fullmatch(title) is None or title.endswith(_OURS):
            raise UsageError(f"{path.name}: variant {number}: {title!r} cannot be the name of a folder and a repo")
        if folded.count(title.lower()) > 1:
            raise UsageError(f"{path.name}: two variants are called {title}", hint="give one of them a name")
    if found.collection is not None and not 0 < len(found.collection) < 60 and not is_slug(found.collection):
        raise UsageError(f"{path.name}: the title of a collection has 1 to 59 characters")
    for template in (found.repo, *(variant.repo for variant in found.variants if variant.repo is not None)):
        if wrong := [name for name in _FIELD.findall(template) if name not in _FIELDS]:
            raise UsageError(f"{path.name}: repo has no {{{wrong[0]}}}", hint=f"it has {', '.join(_FIELDS)}")
    for gates in (found.gates, *(variant.gates for variant in found.variants if variant.gates is not None)):
        if isinstance(gates.max_size, str):
            parse_size(gates.max_size)


def repo_of(found: ReleaseFile, model: Model, variant: Variant, owner: str | None) -> str | None:
    """The repo that a variant of a model goes to; ``None``: no owner is known."""
    owner = owner or found.owner
    template = variant.repo or found.repo
    if owner is None and "{owner}" in template:
        return None
    scheme = variant.scheme or variant.title
    values = {"owner": owner or "", "model": model.title, "scheme": scheme, "variant": variant.title}
    return _FIELD.sub(lambda match: values[match[1]], template)


def _text(value: Any) -> str:
    """A value as ``--set`` takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def options_of(found: ReleaseFile, model: Model, variant: Variant, folder: Path) -> dict[str, Any]:
    """Keyword arguments of ``quantize`` for a variant, but for the output.

    Args:
        found: the release.
        model: one of its models.
        variant: one of its variants; what it says goes before the defaults, ``skip`` and ``set`` are added to theirs.
        folder: that the release file lies in.
    """
    own = variant.model_dump(exclude={"name", "scheme", "recipe", "repo", "gates"}, exclude_defaults=True)
    both: dict[str, Any] = {**found.defaults.model_dump(exclude_defaults=True), **own}
    skips = [*found.defaults.skip, *variant.skip]
    both["skip"] = [entry.pattern if isinstance(entry, Skip) else entry for entry in skips]
    settings: Mapping[str, Any] = {**found.defaults.set, **variant.set}
    both.pop("set", None)
    both["settings"] = {key: _text(value) for key, value in settings.items()}
    if variant.recipe is not None:
        both["recipe"] = folder / variant.recipe
        both.pop("group_size", None)
        both.pop("settings")
    both |= {"revision": model.revision, "subfolder": model.subfolder}
    return {key: value for key, value in both.items() if value not in ([], {}, None)}
