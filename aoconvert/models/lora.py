"""LoRAs that are added to a model's weights: which tensor gets what.

A LoRA holds two thin matrices for each layer that it changes; ``B @ A``, times a factor, is added to the weight. Names,
ranks and factors are read as the libraries read them: diffusers' own ``lora_state_dict`` of a pipeline runs on tensors
without data (see :mod:`aoconvert.models.recording`), and gives each layer's names.
Sources: ``diffusers.loaders.peft.PeftAdapterMixin.load_lora_adapter``, ``diffusers.utils.peft_utils.get_peft_kwargs``;
PEFT's ``tuners.lora`` (``LoraModel._create_and_replace``, ``get_delta_weight`` of ``layer.py``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from aoconvert.environment import import_diffusers
from aoconvert.errors import SourceError
from aoconvert.formats.registry import open_reader
from aoconvert.models.base import SourceTensor, TensorSpec

if TYPE_CHECKING:
    from aoconvert.models import ModelLayout, Skeleton
    from aoconvert.models.lora_files import LoraFile
    from aoconvert.models.recording import Step

_PEFT = "base_model.model."  # before each name, as PEFT saves it
_METADATA = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY
_PARTS = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.default)?(?P<leaf>\.weight|\.bias)?"
)
_OTHERS = (
    (re.compile(r".*(lora_magnitude_vector|dora_scale).*"), "DoRA"),
    (re.compile(r".*(\.hada_|\.lokr_|\.oft_|oft_R|oft_S|\.on_input).*"), "LoHa, LoKr or OFT"),
    (re.compile(r".*(modules_to_save|\.diff(_b)?|\.set_weight|\.base_layer\.).*"), "a full weight beside the LoRA"),
)
_FLAT = re.compile(r"(lora|lycoris)_(unet|te\d?|transformer|prior)(_|\.)")  # underscores in place of dots
_MERGE_HINT = "merge it with its own library (peft: merge_and_unload, diffusers: fuse_lora), and quantize the result"


@dataclass(frozen=True)
class Delta:
    """What is added to one tensor: ``scaling * B @ A``, or ``scaling * B`` for a bias.

    Attributes:
        lora: the file that holds it.
        kind: ``matrix``: rows of B are rows of the weight; ``transposed``: rows of the weight are columns of A (an
            embedding table, GPT-2's Conv1D); ``convolution``; ``bias``.
        b, a: how the two are made of the file's tensors; a bias has no A.
        scaling: the factor, the user's weight included.
    """

    lora: LoraFile
    kind: Literal["matrix", "transposed", "convolution", "bias"]
    b: Step = field(repr=False)
    a: Step | None = field(repr=False)
    scaling: float


@dataclass(frozen=True)
class LoraPart:
    """What a LoRA holds for one component: names → how they are made, and the settings that give ranks and factors."""

    lora: LoraFile
    tensors: Mapping[str, Step] = field(repr=False)
    settings: Mapping[str, Any] = field(repr=False)


def split_lora(lora: LoraFile, layout: ModelLayout) -> dict[str, LoraPart]:
    """What a LoRA holds for each component, by the component's name.

    Raises:
        SourceError: it is damaged, or of a kind that is not supported.
    """
    found, values, metadata = _contents(lora)
    _refuse_others(lora, found)
    if lora.config is not None:
        parts = _by_component(lora, layout, {name.removeprefix(_PEFT): step for name, step in found.items()})
        return {name: LoraPart(lora, steps, lora.config) for name, steps in parts.items()}
    if layout.kind != "pipeline" and any(name.startswith(_PEFT) for name in found):
        raise SourceError(
            f"{lora.label} has no adapter_config.json beside it, which says by how much it changes the model",
            hint="download the whole adapter",
        )
    if layout.kind != "pipeline" and (flat := next((name for name in found if _FLAT.match(name)), None)) is not None:
        raise SourceError(
            f"{lora.label}: {flat} is a name by kohya's scripts, which only a pipeline's own code converts",
            hint="quantize the folder of the whole pipeline with --lora (--component-only: its denoiser alone), or "
            "load the LoRA into the pipeline, and save it with save_lora_weights",
        )
    found, alphas = _name_tensors(lora, layout, found, values)
    return {
        name: LoraPart(lora, steps, _settings(lora, name, steps, alphas, metadata))
        for name, steps in _by_component(lora, layout, found).items()
    }


def _contents(lora: LoraFile) -> tuple[dict[str, Step], dict[str, Any], Mapping[str, Any] | None]:
    """Its tensors without data; single values, which are alphas; what diffusers noted in the header."""
    from aoconvert.models.recording import Step

    reader = open_reader(lora.place)
    try:
        infos = reader.infos()
        tensors = {
            name: Step(info.shape, info.dtype, SourceTensor(lora.label, name, info.dtype, info.shape, info.nbytes))
            for name, info in infos.items()
        }
        values = {name: reader.read(name) for name, step in tensors.items() if math.prod(step.shape) == 1}
    finally:
        reader.close()
    note = lora.header.get(_METADATA)
    try:
        metadata = json.loads(note) if note else None
    except ValueError as error:
        raise SourceError(f"{lora.label}: its {_METADATA} is not JSON", hint="download it again") from error
    return tensors, values, metadata if isinstance(metadata, dict) else None


def _refuse_others(lora: LoraFile, names: Mapping[str, Any]) -> None:
    if (lora.config or {}).get("use_dora"):
        raise SourceError(f"{lora.label} is a DoRA, which aoconvert does not merge", hint=_MERGE_HINT)
    kind = (lora.config or {}).get("peft_type", "LORA")
    if kind != "LORA":
        raise SourceError(f"{lora.label} is a {kind} adapter, which aoconvert does not merge", hint=_MERGE_HINT)
    for name in names:
        for pattern, what in _OTHERS:
            if pattern.fullmatch(name):
                raise SourceError(
                    f"{lora.label}: {name} belongs to {what}, which aoconvert does not merge", hint=_MERGE_HINT
                )


def _name_tensors(
    lora: LoraFile, layout: ModelLayout, found: Mapping[str, Step], values: Mapping[str, Any]
) -> tuple[dict[str, Step], dict[str, float]]:
    """The names that the pipeline gives the tensors, and the alphas by name."""
    from aoconvert.models.recording import CannotRecord, Recording

    diffusers = import_diffusers()
    given = {name: values.get(name, Recording.of(step)) for name, step in found.items()}
    alphas: Mapping[str, Any] | None = None
    read = getattr(getattr(diffusers, layout.class_name, None), "lora_state_dict", None)
    own = {part.name for part in layout.components}
    if read is not None and any(name.partition(".")[0] not in own or not _PARTS.fullmatch(name) for name in found):
        try:
            made = read(dict(given), **({"return_alphas": True} if _takes_alphas(read) else {}))
        except CannotRecord as why:
            said = f"{lora.label}: diffusers' conversion of its names needs the values: {why}"
            raise SourceError(said, hint=_MERGE_HINT) from why
        except Exception as error:
            said = f"{lora.label}: {layout.class_name} does not know its names: {error}".splitlines()[0]
            raise SourceError(said, hint=_MERGE_HINT) from error
        given, alphas = (made[0], made[1]) if isinstance(made, tuple) else (made, None)
    found_alphas = {name: float(value) for name, value in (alphas or {}).items()}
    found_alphas |= {n: float(v) for n, v in given.items() if n.endswith(".alpha") and not isinstance(v, Recording)}
    given = {name: value for name, value in given.items() if isinstance(value, Recording)}
    return {name: value.step for name, value in _in_peft_names(given).items()}, found_alphas


def _takes_alphas(read: Any) -> bool:
    import inspect

    return "return_alphas" in inspect.signature(inspect.unwrap(read)).parameters


def _in_peft_names(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """diffusers' older names (``to_q.lora.down``) → PEFT's, by diffusers' own tables."""
    if all(_PARTS.fullmatch(name) for name in tensors):
        return tensors
    from diffusers.utils.state_dict_utils import DIFFUSERS_TO_PEFT, convert_state_dict, convert_unet_state_dict_to_peft

    made: Mapping[str, Any] = convert_state_dict(convert_unet_state_dict_to_peft(tensors), DIFFUSERS_TO_PEFT)
    return made


def _by_component(lora: LoraFile, layout: ModelLayout, tensors: Mapping[str, Step]) -> dict[str, dict[str, Step]]:
    """Tensors by component, whose name they begin with; those of nobody are of the only model, or the denoiser."""
    names = {part.name for part in layout.components if part.name}
    default = [part.name for part in layout.default_components][:1]
    parts: dict[str, dict[str, Step]] = {}
    firsts = {name.partition(".")[0] for name in tensors}
    single = layout.kind == "diffusers" and len(firsts) == 1 and firsts <= {"transformer", "unet"}
    for name, step in tensors.items():
        first, _, rest = name.partition(".")
        if first in names or single:
            parts.setdefault("" if single else first, {})[rest] = step
        elif default:
            parts.setdefault(default[0], {})[name] = step
        else:
            raise SourceError(f"{lora.label}: {name} is for none of the pipeline's models", hint="check the file")
    return parts


def _settings(
    lora: LoraFile,
    component: str,
    tensors: Mapping[str, Step],
    alphas: Mapping[str, float],
    metadata: Mapping[str, Any] | None,
) -> Mapping[str, Any]:
    """Ranks and alphas as diffusers finds them: noted in the header, or of shapes and alphas.

    Raises:
        SourceError: it is a DoRA.
    """
    from diffusers.utils.peft_utils import get_peft_kwargs

    if metadata is not None:
        own = {name.removeprefix(f"{component}."): value for name, value in metadata.items()}
        if own.get("use_dora"):
            raise SourceError(f"{lora.label} is a DoRA, which aoconvert does not merge", hint=_MERGE_HINT)
        if "r" in own:
            return own
    modules = {match["module"] for name in tensors if (match := _PARTS.fullmatch(name))}
    mine: dict[str, float] = {}
    for name, alpha in alphas.items():
        for prefix in (f"{component}.", "transformer.", "unet.", ""):
            if name.startswith(prefix) and name.removeprefix(prefix).removesuffix(".alpha") in modules:
                mine[name.removeprefix(prefix)] = alpha
    ranks = {f"^{name}": step.shape[1] for name, step in tensors.items() if "lora_B" in name and len(step.shape) > 1}
    if not ranks:
        raise SourceError(f"{lora.label} holds no LoRA", hint="check the file")
    found: Mapping[str, Any] = get_peft_kwargs(ranks, mine or None, dict(tensors))
    return found


def match_deltas(part: LoraPart, skeleton: Skeleton) -> tuple[dict[str, Delta], list[str]]:
    """Which tensor of a model gets what of a LoRA, and what is wrong with it."""
    specs = {spec.name: spec for spec in skeleton}
    pairs: dict[tuple[str, str], dict[str, Step]] = {}
    problems = []
    for name, step in part.tensors.items():
        match = _PARTS.fullmatch(name)
        if match is None:
            problems.append(f"{name} is not a tensor of a LoRA that aoconvert knows")
            continue
        leaf = "bias" if match["leaf"] == ".bias" else "weight"
        pairs.setdefault((match["module"], leaf), {})[match["part"][-1]] = step
        if f"{match['module']}.{leaf}" not in specs:
            problems.append(f"{name} has no tensor in {skeleton.component.class_name}")
    deltas = {}
    for (module, leaf), both in [] if problems else pairs.items():
        made = _delta(part, module, specs[f"{module}.{leaf}"], both)
        if isinstance(made, str):
            problems.append(f"{module}: {made}")
        else:
            deltas[f"{module}.{leaf}"] = made
    title = skeleton.component.title
    return deltas, [f"{title}: --lora {part.lora.label}: {line}" for line in _shorten(problems)]


def _shorten(problems: Sequence[str]) -> Iterator[str]:
    if problems:
        more = len(problems) - 1
        yield problems[0] + (f" (and {more} more likewise)" if more else "")


def _delta(part: LoraPart, module: str, spec: TensorSpec, both: Mapping[str, Step]) -> Delta | str:
    """What is added to a tensor, or why that cannot be."""
    scaling = _scaling(part, module)
    make = partial(Delta, part.lora, scaling=scaling[0])
    if spec.tied_to is not None:
        return f"it is the same tensor as {spec.tied_to}, which aoconvert does not change"
    b, a = both.get("B"), both.get("A")
    if b is None or (a is None and spec.name.endswith(".weight")):
        return "one of the two matrices is missing"
    if a is None:
        return make(kind="bias", b=b, a=None) if b.shape == spec.shape else _ill_fitting(spec, b.shape)
    kind: Literal["matrix", "transposed", "convolution"] = "matrix"
    if len(spec.shape) > 2:
        kind, made = "convolution", (b.shape[0], *a.shape[1:])
    elif spec.kind == "embedding" or spec.module_class == "Conv1D":
        kind, made = "transposed", (a.shape[1], b.shape[0])
    else:
        made = (b.shape[0], a.shape[1]) if len(a.shape) == len(b.shape) == 2 else ()
    if made != spec.shape:
        return _ill_fitting(spec, made)
    if b.shape[1] != scaling[1] or a.shape[0] != scaling[1]:
        return f"its rank is {b.shape[1]}, the LoRA's settings say {scaling[1]}"
    return make(kind=kind, b=b, a=a)


def _ill_fitting(spec: TensorSpec, shape: Sequence[int]) -> str:
    return f"it gives the shape {list(shape)}, the model has {list(spec.shape)}: a LoRA of another model"


def _scaling(part: LoraPart, module: str) -> tuple[float, int]:
    """The factor, and the rank, by PEFT's rules (``LoraModel._create_and_replace``, ``LoraLayer.set_scale``)."""
    settings = part.settings
    ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
    rank = int(ranks.get(_pattern(ranks, module), settings.get("r", 8)))
    alpha = alphas.get(_pattern(alphas, module), settings.get("lora_alpha", 8))
    return part.lora.weight * alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank), rank


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """The first key that matches the module's name or its end (``peft.utils.other.get_pattern_key``)."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)
