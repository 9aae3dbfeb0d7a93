"""What both models are given: text in windows, text that the original generates, random tokens, or other inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aoconvert import inputs
from aoconvert.evaluation.figures import NotFiniteError

Sample = dict[str, Any]
"""Arguments of a forward pass."""


class BadInputs(Exception):
    """Why there is nothing to compare on: one line, and what to do next."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Wishes:
    """What is to be made.

    Attributes:
        task: of the model.
        text: files.
        samples, tokens, seed: how many windows, of how many tokens, and of what is drawn.
        folder: of the original.
        trust: whether code of a tokenizer may run.
    """

    task: str
    text: tuple[str, ...]
    samples: int
    tokens: int
    seed: int
    folder: str
    trust: bool


@dataclass(frozen=True)
class Made:
    """The samples, and where they come from."""

    kind: str
    samples: list[Sample]
    detail: str


def make_samples(model: Any, wishes: Wishes) -> Made:
    """Make what both models are given.

    Raises:
        BadInputs: the text is too short, there is no tokenizer, or the model takes none of this.
    """
    takes_tokens = _takes(model, "input_ids")
    if wishes.text:
        if not takes_tokens:
            raise BadInputs(f"{type(model).__name__} takes no text", "omit --text")
        return _read_text(model, wishes)
    if not takes_tokens or not _vocabulary(model):
        return _search(model, wishes)
    if wishes.task == "causal-lm":
        return _generate(model, wishes)
    ids = _draw(model, wishes)
    if wishes.task == "seq2seq":
        return _continue(model, ids, wishes)
    return Made(
        "random-tokens",
        [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids],
        f"random token ids, seed {wishes.seed}: the figures say little about text",
    )


def digest(samples: Sequence[Sample]) -> str:
    """SHA-256 (hex) of names, dtypes, shapes and bytes of what is in them."""
    total = hashlib.sha256()
    for sample in samples:
        for name, value in _flat(sample, ""):
            total.update(name.encode())
            if isinstance(value, torch.Tensor):
                total.update(f"{value.dtype}{tuple(value.shape)}".encode())
                total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
            else:
                total.update(repr(value).encode())
    return total.hexdigest()


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _flat(value[key], f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for at, item in enumerate(value):
            yield from _flat(item, f"{name}.{at}")
    else:
        yield name, value


def _takes(model: Any, name: str) -> bool:
    import inspect

    return name in inspect.signature(model.forward).parameters


def _vocabulary(model: Any) -> int:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return int(getattr(config, "vocab_size", 0) or 0)


def _length(model: Any, tokens: int) -> int:
    """Tokens of a window that the model has positions for; RoBERTa's begin behind its padding token."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(most, int) or most < 1:
        return tokens
    offset = getattr(config, "pad_token_id", None) if "roberta" in str(getattr(config, "model_type", "")) else None
    return min(tokens, most - (offset + 1 if offset is not None else 0))


def _read_text(model: Any, wishes: Wishes) -> Made:
    tokenizer = _tokenizer(wishes)
    before, after = _special_tokens(tokenizer)
    if wishes.task == "causal-lm":
        after = []
    window = _length(model, wishes.tokens)
    room = max(2, window - len(before) - len(after))
    least = 2 if wishes.task in ("causal-lm", "seq2seq") else 1
    pieces: list[list[int]] = []
    for path in wishes.text:
        text = Path(path).read_text(encoding="utf-8")
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces += [ids[start : start + room] for start in range(0, len(ids), room)]
    pieces = [piece for piece in pieces if len(piece) >= least][: wishes.samples]
    if not pieces:
        names = ", ".join(Path(path).name for path in wishes.text)
        raise BadInputs(f"{names}: the text has fewer than {least} tokens", "give a longer text")
    vocabulary = _vocabulary(model)
    largest = max(max(piece) for piece in pieces)
    if vocabulary and largest >= vocabulary:
        raise BadInputs(
            f"the tokenizer gives token {largest}, but the model has a vocabulary of {vocabulary}: they do not belong "
            "together"
        )
    rows = [torch.tensor([*before, *piece, *after]) for piece in pieces]
    if wishes.task == "seq2seq":
        samples = [_halve(model, torch.tensor(piece), after) for piece in pieces]
    else:
        samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]
    return Made("text", samples, f"{len(pieces)} windows of up to {window} tokens, in the order of the text")


def _tokenizer(wishes: Wishes) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            wishes.folder, local_files_only=True, trust_remote_code=wishes.trust
        )
    except Exception as error:
        raise BadInputs(
            f"--text needs a tokenizer, and transformers finds none in the source ({type(error).__name__})",
            "omit --text: the original then generates the text",
        ) from error


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _halve(model: Any, piece: torch.Tensor, after: list[int]) -> Sample:
    """The first half of a window for the encoder, the second for the decoder, which predicts each of its tokens."""
    middle = len(piece) // 2
    encoded = torch.cat([piece[:middle], torch.tensor(after, dtype=piece.dtype)])[None]
    return {
        "input_ids": encoded,
        "attention_mask": torch.ones_like(encoded),
        "decoder_input_ids": torch.cat([torch.tensor([_decoder_start(model)]), piece[middle:]])[None],
    }


def _decoder_start(model: Any) -> int:
    for config in (model.config, getattr(model, "generation_config", None)):
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            found = getattr(config, name, None)
            if isinstance(found, int):
                return found
    return 0


def _start_token(model: Any) -> int:
    """The token that a text begins with: of what the configs name the first that there is."""
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    vocabulary = _vocabulary(model)
    for config in (text, model.config, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id"):
            found = getattr(config, name, None)
            found = found[0] if isinstance(found, (list, tuple)) and found else found
            if isinstance(found, int) and 0 <= found < vocabulary:
                return found
    return 0


def _generate(model: Any, wishes: Wishes) -> Made:
    """Text by the original itself, drawn from its own distribution without any cut."""
    start = _start_token(model)
    length = _length(model, wishes.tokens)
    begin = torch.full((wishes.samples, 1), start, device=model.device)
    rows = _draw_text(model, {"input_ids": begin, "attention_mask": torch.ones_like(begin)}, length - 1, wishes.seed)
    return Made(
        "generated",
        [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows],
        f"text that the original generates from its token {start}, drawn at temperature 1, seed {wishes.seed}",
    )


def _continue(model: Any, ids: torch.Tensor, wishes: Wishes) -> Made:
    given = {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}
    rows = _draw_text(model, given, _length(model, wishes.tokens) - 1, wishes.seed)
    return Made(
        "generated",
        [
            {"input_ids": row[None], "attention_mask": torch.ones_like(row[None]), "decoder_input_ids": made[None]}
            for row, made in zip(ids, rows, strict=True)
        ],
        f"random token ids for the encoder, and what the original's decoder generates from them at temperature 1, "
        f"seed {wishes.seed}",
    )


def _draw_text(model: Any, given: dict[str, torch.Tensor], length: int, seed: int) -> torch.Tensor:
    """So many tokens by the library's own ``generate``; the end of a text does not end it."""
    import transformers

    pad = next(
        (found for found in (model.config.pad_token_id, model.generation_config.pad_token_id) if found is not None), 0
    )
    settings = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length, min_new_tokens=length,
        pad_token_id=pad, decoder_start_token_id=_decoder_start(model) if model.config.is_encoder_decoder else None,
        bos_token_id=_start_token(model), eos_token_id=None,
    )  # fmt: skip
    kept = model.generation_config
    model.generation_config = settings  # else what it lacks is taken from the model's own
    torch.manual_seed(seed)
    try:
        with torch.no_grad():
            rows: torch.Tensor = model.generate(**given, generation_config=settings)
    except (RuntimeError, ValueError, IndexError) as error:
        _refuse_nan(model, given, error)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInputs(f"the original cannot generate text: {lines[0]}", "give a text with --text") from error
    finally:
        model.generation_config = kept
    return rows.cpu()


def _refuse_nan(model: Any, given: dict[str, torch.Tensor], error: Exception) -> None:
    """Say that the model gives NaN, where that is why it cannot generate: torch says so of probabilities only."""
    if model.config.is_encoder_decoder:
        start = torch.full((len(given["input_ids"]), 1), _decoder_start(model), device=model.device)
        given = {**given, "decoder_input_ids": start}
    try:
        with torch.no_grad():
            finite = bool(model(**given).logits.isfinite().all())
    except (RuntimeError, ValueError, IndexError):
        return
    if not finite:
        raise NotFiniteError("original") from error


def _draw(model: Any, wishes: Wishes) -> torch.Tensor:
    """Random token ids, without those that have a meaning of their own."""
    config = model.config
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "sep", "cls", "mask")}
    allowed = torch.tensor([number for number in range(_vocabulary(model)) if number not in special])
    generator = torch.Generator().manual_seed(wishes.seed)
    places = torch.randint(len(allowed), (wishes.samples, _length(model, wishes.tokens)), generator=generator)
    return allowed[places]


def _search(model: Any, wishes: Wishes) -> Made:
    """Inputs that the libraries have for the model, or that the search finds."""
    try:
        places = inputs.processor_folders(Path(wishes.folder))
        found = inputs.find_inputs(model, list(inputs.from_libraries(model, places, trust=wishes.trust)))
    except inputs.NoInputs as error:
        raise BadInputs(f"no input that {type(model).__name__} accepts: {error}") from error
    made = found.make()
    return Made("inputs", [made], f"one input for {type(model).__name__}, made by: {found.source}")


def save_samples(folder: Path, made: Made, facts: dict[str, Any]) -> None:
    """Keep them: the tensors first, then what they are."""
    draft = folder / ".data.pt"
    torch.save(made.samples, draft)
    draft.replace(folder / "data.pt")
    draft = folder / ".data.json"
    draft.write_text(json.dumps(facts), encoding="utf-8")
    draft.replace(folder / "data.json")


def load_samples(folder: Path) -> list[Sample]:
    """Read what was kept."""
    found: list[Sample] = torch.load(folder / "data.pt", weights_only=True)
    return found
