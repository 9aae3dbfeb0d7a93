"""Real weights: a trained BERT gives the same embeddings after int8wo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import aoconvert

SENTENCES = [
    "The cat sits on the mat.",
    "A panda plays a small guitar in a bamboo forest.",
    "Interest rates rose again this quarter.",
    "She booked a flight to Lisbon for Friday.",
    "The proof uses induction on the length of the list.",
    "Rain is expected in the north tomorrow.",
    "He forgot to water the plants.",
    "Quantization trades precision for memory.",
    "The museum opens at nine in the morning.",
    "Their new album is louder than the last one.",
    "Water boils at a lower temperature on a mountain.",
    "The committee postponed its decision.",
    "Add two eggs and stir until smooth.",
    "The bridge was closed for repairs.",
    "Light from that star left it a thousand years ago.",
    "The contract ends on the thirtieth of June.",
    "My neighbour is learning to play the cello.",
    "Vaccines train the immune system.",
    "The train to Kyoto leaves from platform four.",
    "An empty model has its parameters on the meta device.",
]


def embed(model: Any, tokenizer: Any) -> torch.Tensor:
    batch = tokenizer(SENTENCES, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def test_minilm_embeddings_stay(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    source = checkpoints("bert")
    result = aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    assert result.quantized_fraction > 0.99
    before = embed(AutoModel.from_pretrained(source, dtype=torch.float32), AutoTokenizer.from_pretrained(source))
    opened = AutoModel.from_pretrained(tmp_path / "out")
    assert type(opened.encoder.layer[0].intermediate.dense.weight.data).__name__ == "Int8Tensor"
    after = embed(opened, AutoTokenizer.from_pretrained(tmp_path / "out"))
    cosine = (before * after).sum(1)
    assert cosine.min() >= 0.999, cosine.min()
    assert not torch.equal(before, after)


def test_minilm_folder_is_complete(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """What a sentence-transformers model consists of is all there, and no weights of the source."""
    result = aoconvert.quantize(checkpoints("bert"), "int8wo", output=tmp_path / "out", device="cpu")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {
        "config.json",
        "pytorch_model.bin",
        "aoconvert.json",
        "tokenizer.json",
        "vocab.txt",
        "modules.json",
    } <= found
    assert "1_Pooling/config.json" in found
    assert not {"model.safetensors", "README.md"} & found
    assert found == {entry.path for entry in result.manifest.files()} | {"aoconvert.json"}
