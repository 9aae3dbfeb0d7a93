"""A tiny Llama that has learned a small language, so that its weights are not noise: about 30 s on two cores."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

VOCABULARY = 96


def sentences(count: int, length: int, seed: int) -> torch.Tensor:
    """Text of a language: of the two tokens before it depends which four may follow, and one of them is likely."""
    draw = torch.Generator().manual_seed(seed)
    rules = torch.Generator().manual_seed(0)
    following = torch.randint(2, VOCABULARY, (VOCABULARY, 4), generator=rules)
    shift = torch.randint(0, VOCABULARY, (VOCABULARY,), generator=rules)
    tokens = torch.randint(2, VOCABULARY, (count, length), generator=draw)
    tokens[:, 0] = 1
    for at in range(2, length):
        choice = torch.multinomial(torch.tensor([0.7, 0.15, 0.1, 0.05]).expand(count, 4), 1, generator=draw)[:, 0]
        likely = following[tokens[:, at - 1], choice]
        tokens[:, at] = 2 + (likely + shift[tokens[:, at - 2]] % 7) % (VOCABULARY - 2)
    return tokens


def train_llama(folder: Path, steps: int = 400) -> float:
    """Train it, save it in bfloat16; gives the loss at the end, in nats per token (log 96 is 4.56)."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=64, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    steer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(steer, 3e-3, total_steps=steps)
    loss = torch.tensor(0.0)
    for step in range(steps):
        batch = sentences(32, 48, seed=step + 1)
        loss = model(input_ids=batch, labels=batch).loss
        steer.zero_grad()
        loss.backward()
        steer.step()
        rate.step()
    model.to(torch.bfloat16).save_pretrained(folder)
    return float(loss.detach())
