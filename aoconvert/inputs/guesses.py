"""First guesses: what an argument of that name usually is, in the sizes that the config gives; the likeliest first."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from .blanks import Blank, Kind
from .facts import Facts

TOKENS = 7  # of a text: a number that no other size is likely to be
_SIDE = 16  # of an image that may have any size
_PATCHES = 16  # of an image that comes as a sequence

_SIZES = ("image_size", "img_size", "input_size", "sample_size", "sample_height", "input_image_size", "resolution")
_WIDTHS = ("hidden_size", "d_model", "dim", "inner_dim", "embed_dim", "n_embd", "width", "hidden_dim")
_TEXT = (
    "joint_attention_dim",
    "cross_attention_dim",
    "caption_channels",
    "text_embed_dim",
    "text_dim",
    "cap_feat_dim",
    "text_states_dim",
    "encoder_hidden_size",
    "text_in_dim",
    "context_in_dim",
    "encoder_hid_dim",
    "text_hidden_dim",
    "caption_projection_dim",
    "context_dim",
    "caption_channels",
    "text_hidden_size",
    "condition_dim",
)
_POOLED = (
    "pooled_projection_dim",
    "clip_text_pooled_in_channels",
    "pooled_text_embed_dim",
    "projection_dim",
    "text_embed_dim",
    "clip_embed_dim",
    "embedding_dim",
)

Guess = Callable[[Facts, str], Iterator[Any]]


def guesses(facts: Facts, name: str) -> list[Any]:
    """What an argument may be."""
    guess = next(guess for pattern, guess in _GUESSES if pattern.fullmatch(name))
    found: list[Any] = []
    for value in _follow_annotation(facts, name, guess(facts, name)):
        if value not in found:
            found.append(value)
    return found


def _follow_annotation(facts: Facts, name: str, values: Iterator[Any]) -> Iterator[Any]:
    """The guesses as the annotation wants them: in a list, or numbers instead."""
    parameter = facts.parameters.get(name)
    kind = str(parameter.annotation).lower() if parameter is not None else ""
    kind = re.sub(r"typing\.|optional\[|<class '", "", kind)
    if kind and not _KNOWN.search(kind):  # a choice of words, a cache, an output: no tensor serves for it
        return
    if re.match(r"(list|tuple)\[int", kind):
        yield from ([1], [5], [4], [2])
    elif kind.startswith("list[list[tuple[int"):
        yield [[(1, 4, 4)]]
    elif kind.startswith("list[tuple[int"):
        yield [(1, 4, 4)]
    elif kind.startswith("dict"):
        yield {}
    elif re.match(r"int\b", kind) and "tensor" not in kind:
        yield from (1, TOKENS, _PATCHES)
    elif re.match(r"(list|sequence)\[torch", kind):
        for value in values:
            if isinstance(value, Blank):
                yield [replace(value, shape=value.shape[1:])]
                yield [value]
        yield []
    yield from values


_KNOWN = re.compile(r"tensor|\bint\b|float|bool|list|tuple|sequence|iterable|dict|any\b|empty|mapping")


def _side(facts: Facts, near: str = "", ratio: int = 0) -> Iterator[int]:
    given = facts.number(*_SIZES, near=near)
    sizes = [given] if facts.library == "transformers" else [max(_SIDE, 2 * ratio), _SIDE, given]
    yield from dict.fromkeys(size for size in (*sizes, 32, 64, 224, 8) if size)


def _frames(facts: Facts) -> Iterator[int]:
    given = facts.number("num_frames", "sample_frames", "tubelet_size", "frames_per_clip")
    yield from dict.fromkeys(size for size in (given, 4, 5, 1, 2, 8) if size)


def _image(facts: Facts, name: str) -> Iterator[Any]:
    near = "vision" if facts.find("vision_config") is not None else "image"
    channels = facts.number("num_channels", "in_chans", "num_input_channels", "in_channels", near=near, default=3)
    channels = channels if facts.library == "transformers" else 3
    patch = facts.number("patch_size", near=near, default=16)
    merged = channels * patch * patch
    if {"spatial_shapes", "pixel_position_ids", "image_position_ids"} & set(facts.parameters):
        yield Blank((1, _PATCHES, merged))
    temporal = re.search(r"Video|ViViT|Vivit|Timesformer|TimeSformer|VJEPA", facts.class_name) or "videos" in name
    for side in _side(facts, near):
        image = Blank((1, channels, side, side))
        clips = [Blank((1, frames, channels, side, side)) for frames in _frames(facts)][:3]
        yield from [*clips, image] if temporal else [image, *clips[:1]]
    yield Blank((_PATCHES, merged * facts.number("temporal_patch_size", near=near, default=1)))
    yield Blank((1, _PATCHES, merged))


def _latents(facts: Facts, name: str) -> Iterator[Any]:
    """What a denoiser or an autoencoder takes: an image, a video, a sequence of patches, or sound."""
    if name == "inputs" and facts.library == "transformers":
        yield from _ids(facts, name)
    channels = facts.number(
        "in_channels",
        "input_channels",
        "audio_in_channels",
        "latent_channels",
        "z_dim",
        "input_dim",
        "embedding_dim",
        "encoder_in_channels",
        "dim",
        "hidden_size",
        default=3,
    )
    sequence = Blank((1, _PATCHES, channels))
    coded = name in ("sample", "x")  # by an autoencoder: of its latent there has to be more than a single pixel
    ratio = facts.number("spatial_compression_ratio") if coded else 0
    frames = (1 + max(4, facts.number("temporal_compression_ratio") if coded else 0), 1, 4)
    images = [Blank((1, channels, side, side)) for side in _side(facts, ratio=ratio)]
    videos = [Blank((1, channels, count, side, side)) for side in _side(facts, ratio=ratio) for count in frames]
    turned = [Blank((1, count, channels, side, side)) for side in _side(facts, ratio=ratio) for count in frames]
    sounds = [Blank((1, channels, 64)), Blank((1, 64, channels)), Blank((1, channels, 2048))]
    as_sequence = {"img_ids", "img_shapes", "image_rotary_emb", "position_ids", "img_sizes"} & set(facts.parameters)
    if as_sequence:
        yield from [sequence, images[0], videos[0], turned[0]]
    elif re.search(r"3D|Video|Temporal|Motion|Spatio", facts.class_name) or facts.find("temporal_compression_ratio"):
        yield from [videos[0], turned[0], images[0], sequence, *videos[1:6], *turned[1:6]]
    elif re.search(r"1D|Audio|Music|Oobleck", facts.class_name):
        yield from [*sounds, images[0]]
    yield from [*images, sequence, videos[0], turned[0], *sounds]
    yield Blank((1, channels))


def _text_states(facts: Facts, name: str) -> Iterator[Any]:
    hint = "image_dim" if "image" in name else ""
    for key in (hint, *_TEXT, *_WIDTHS):
        if key and (width := facts.number(key)):
            yield Blank((1, _tokens(facts, name), width))
    yield Blank((1, TOKENS, 32))


def _tokens(facts: Facts, name: str) -> int:
    """How many tokens a text has; some configs fix that, for one of two texts each."""
    return facts.number(f"text_len_{name.rpartition('_')[2]}", "text_len", default=TOKENS)


def _guess_pooled(facts: Facts, name: str) -> Iterator[Any]:
    for key in (*_POOLED, *_TEXT, *_WIDTHS):
        if width := facts.number(key):
            yield Blank((1, width))
    yield Blank((1, 32))


def _ids(facts: Facts, name: str) -> Iterator[Any]:
    end = facts.find("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    last = end if isinstance(end, int) and 0 <= end < facts.vocabulary else None
    high = facts.vocabulary
    if name.startswith("decoder") and isinstance(own := facts.find("vocab_size", near="decoder"), int):
        high = min(high, own) if own > 0 else high
    blank = Blank((1, TOKENS), "ids", high, last=last, avoid=facts.special)
    yield blank
    for length in (16, facts.number("max_position_embeddings", default=64), 64):
        yield Blank((1, length), "ids", high, last=last, avoid=facts.special)


def _mask(facts: Facts, name: str) -> Iterator[Any]:
    yield Blank((1, _PATCHES if name == "pixel_attention_mask" else _tokens(facts, name)), "mask")
    yield Blank((1, _tokens(facts, name)), "bool")
    yield Blank((1, _PATCHES), "mask")
    yield Blank((1, _SIDE, _SIDE), "mask")
    yield Blank((1, 1, _SIDE, _SIDE))


def _time(facts: Facts, name: str) -> Iterator[Any]:
    yield Blank((1,), "time")
    yield Blank((1,), "mask")
    yield Blank((1, 5), "time")
    yield Blank((1, 1), "time")
    yield Blank((), "mask")


def _scale(facts: Facts, name: str) -> Iterator[Any]:
    parameter = facts.parameters.get(name)
    if parameter is not None and "float" in str(parameter.annotation).lower():
        yield 1.0
    yield Blank((1,))


def _sound(facts: Facts, name: str) -> Iterator[Any]:
    bins = facts.number(
        "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "input_dim", near="audio", default=80
    )
    length = facts.number("max_length", "max_source_positions", near="audio", default=100)
    conv = 2 * length if facts.find("max_source_positions") else length
    yield Blank((1, bins, conv))
    yield Blank((1, length, bins))
    yield Blank((1, conv, bins))
    yield Blank((1, 64, bins))
    yield Blank((1, 1, length, bins))
    yield Blank((1, 2000))


def _wave(facts: Facts, name: str) -> Iterator[Any]:
    if bins := facts.number("num_mel_bins", "num_mel_channels"):
        yield Blank((1, facts.number("max_length", default=64), bins))
    yield Blank((1, 2000))
    yield Blank((1, 1, 2048))
    yield Blank((1, 16000))


def _series(facts: Facts, name: str) -> Iterator[Any]:
    length = facts.number("context_length", default=32)
    lags = facts.find("lags_sequence")
    length += max(lags) if isinstance(lags, (list, tuple)) and lags else 0
    width = facts.number("num_input_channels", "input_size", default=1)
    kind: Kind = "mask" if "mask" in name else "normal"
    if "time_features" in name:
        yield Blank((1, length, facts.number("num_time_features", default=1)))
    if width > 1:
        yield Blank((1, length, width), kind)
    yield Blank((1, length), kind)
    yield Blank((1, length, width), kind)
    yield Blank((1, length, 1), kind)


def _boxes(facts: Facts, name: str) -> Iterator[Any]:
    yield Blank((1, TOKENS, 4), "mask")
    yield Blank((1, TOKENS, 4))


def _grid(facts: Facts, name: str) -> Iterator[Any]:
    if name == "spatial_shapes":
        yield Blank((1, 2), "given", given=((4, 4),))
    yield Blank((1, 3), "given", given=((1, 4, 4),))
    yield [(1, 4, 4)]


def _sizes(facts: Facts, name: str) -> Iterator[Any]:
    side = next(_side(facts, "vision"))
    yield Blank((1, 2), "given", given=((side, side),))
    yield [[side, side]]
    yield Blank((1, 2))


def _turns(facts: Facts, name: str) -> Iterator[Any]:
    """A rotary embedding: cosines and sines, or complex numbers, of each patch."""
    width = facts.number("attention_head_dim", "head_dim")
    width = width or facts.number(*_WIDTHS) // facts.number("num_attention_heads", "num_heads", default=1)
    if width:
        yield (Blank((_PATCHES, width)), Blank((_PATCHES, width)))
        yield Blank((_PATCHES, width))
        yield Blank((_SIDE, _SIDE, width // 2), "complex")
        yield Blank((_PATCHES, width // 2), "complex")
    yield from _any(facts, name)


def _coordinates(facts: Facts, name: str) -> Iterator[Any]:
    axes = facts.find("axes_dims_rope", "axes_dim", "axes_lens", "rope_axes_dim")
    width = len(axes) if isinstance(axes, (list, tuple)) else 3
    length = TOKENS if re.search("txt|text", name) else _PATCHES
    yield Blank((length, width))
    yield Blank((1, length, width))
    yield Blank((length, 4))
    yield Blank((1, length), "positions")
    yield Blank((length,), "positions")
    yield Blank((3, 1, length), "positions")


def _places(facts: Facts, name: str) -> Iterator[Any]:
    for length in (5, TOKENS, _PATCHES):
        yield Blank((1, length), "positions")
        yield Blank((length,), "positions")


def _shapes(facts: Facts, name: str) -> Iterator[Any]:
    yield [[(1, 4, 4)]]
    yield [(1, 4, 4)]
    yield [(4, 4)]


def _conditions(facts: Facts, name: str) -> Iterator[Any]:
    yield {"resolution": None, "aspect_ratio": None}
    yield {}


def _label(facts: Facts, name: str) -> Iterator[Any]:
    yield Blank((1,), "long")
    yield Blank((1,))
    yield from _guess_pooled(facts, name)


def _meta(facts: Facts, name: str) -> Iterator[Any]:
    yield Blank((1, 6), "time")  # two sizes and a corner


def _control(facts: Facts, name: str) -> Iterator[Any]:
    channels = facts.number("conditioning_channels", "in_channels", default=3)
    yield Blank((1, channels, 8 * _SIDE, 8 * _SIDE))
    yield from _latents(facts, name)


def _any(facts: Facts, name: str) -> Iterator[Any]:
    """A name that says nothing: by its annotation, and then anything."""
    parameter = facts.parameters.get(name)
    kind = str(parameter.annotation) if parameter is not None else ""
    if "Tensor" not in kind:
        if "float" in kind:
            yield 1.0
        if "int" in kind:
            yield 1
        if "bool" in kind:
            yield False
    if "LongTensor" in kind or re.search(r"ids?$|index|indices|idx|position|token", name):
        yield Blank((1, TOKENS), "positions")
        yield Blank((TOKENS,), "positions")
        yield Blank((1,), "long")
    if "list" in kind.lower():
        yield list(_text_states(facts, name))[:1]
    yield from _text_states(facts, name)
    yield from _guess_pooled(facts, name)
    yield Blank((1,))


_GUESSES: tuple[tuple[re.Pattern[str], Guess], ...] = tuple(
    (re.compile(pattern), guess)
    for pattern, guess in (
        (r"micro_conds|added_time_ids", lambda facts, name: iter((Blank((1, 6)), Blank((1, 5))))),
        (r"condition_mask", lambda facts, name: iter((Blank((1, 1, 5, _SIDE, _SIDE)), Blank((1, TOKENS), "mask")))),
        (r".*attention_mask.*|text_embedding_mask.*|.*(_|^)masks?(_.*)?|encoder_hidden_states_mask", _mask),
        (r".*token_type_ids?", lambda facts, name: iter((Blank((1, TOKENS), "long"),))),
        (r"indices_.*|.*_(indices|indexes)", _places),
        (r"past_.*|future_.*", _series),
        (r"(.*_)?input_ids|input|langs|\w*token_ids|decoder_input_tokens", _ids),
        (r".*pixel_values.*|image|images|xs", _image),
        (r".*input_features.*|spectrogram|.*_?mel(_.*)?", _sound),
        (r"(decoder_)?input_values|waveform|audio", _wave),
        (r"bbox|boxes|input_boxes|visual_pos", _boxes),
        (r".*grid_thw|spatial_shapes|.*grid_hws", _grid),
        (r"(image|target|original|crop|input_image|img)_?(sizes?|coords)|crop_coords", _sizes),
        (r"(img|txt|video|audio|text|image)_(ids|coords|positions?)|position_ids", _coordinates),
        (r"(img|image|video|vision)_(shapes|sizes)", _shapes),
        (r".*rotary_emb.*|.*freqs_cis", _turns),
        (
            r".*timesteps?(_.*)?|t|time_step|guidance|.*sigma|r_timestep|noise_time|.*_time|timestep_ratio|fps|ofs",
            _time,
        ),
        (r"added_cond_kwargs|conditioning", _conditions),
        (r"image_meta_size", _meta),
        (r"class_labels|labels|style|control_type_idx", _label),
        (r"controlnet_cond|control_latents|control_context", _control),
        (r"pooled_\w+|\w*_pooled|.*text_embeds|proj_embedding|image_embeds|class_labels_emb", _guess_pooled),
        (r".*_scale", _scale),
        (r"(pose|control|clean|source|reference|condition)_hidden_states", _latents),
        (r"hidden_states|sample|x|latents?|.*_latents|latents_.*|z|z_latent|input|inputs", _latents),
        (
            r".*encoder_hidden_states.*|.*hidden_states.*|cap_feats|prompt_embeds|inputs_embeds|encoder_outputs",
            _text_states,
        ),
        (r".*", _any),
    )
)
