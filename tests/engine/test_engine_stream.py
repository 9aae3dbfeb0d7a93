"""The stages together: what fails where, and what is left then; channels; determinism; shards."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.forking import WITH_LIBRARIES, Forker
from hypothesis import given, settings
from hypothesis import strategies as st

import aoconvert
from aoconvert.engine.channel import Channel, Closed
from aoconvert.errors import QuantizeError, ReadError, WriteError
from aoconvert.options import QuantizeOptions
from aoconvert.planning.build import build_plan
from aoconvert.sources import resolve


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 50), max_size=60), limit=st.integers(1, 80))
def test_channel_keeps_order_and_bound(sizes: list[int], limit: int) -> None:
    channel: Channel[int] = Channel(limit)
    waiting: list[int] = []
    most = 0

    def send() -> None:
        for number, size in enumerate(sizes):
            channel.put(number, size)
            waiting.append(size)
        channel.end()

    thread = threading.Thread(target=send)
    thread.start()
    received = []
    while (item := channel.get()) is not None:
        held = channel._bytes
        most = max(most, held)
        received.append(item)
    thread.join(5)
    assert received == list(range(len(sizes)))
    assert most <= max([limit, *sizes])


def test_whoever_waits_for_room_goes_on_when_there_is_some() -> None:
    channel: Channel[int] = Channel(10)
    channel.wait(10**12)  # alone it passes
    channel.put(0, 6)
    channel.wait(4)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (channel.wait(5), done.set()))
    thread.start()
    assert not done.wait(0.05)
    channel.get()
    assert done.wait(5)
    thread.join(5)


def test_a_giant_passes_a_small_channel() -> None:
    channel: Channel[str] = Channel(1)
    channel.put("giant", 10**12)
    assert channel.get() == "giant"


@pytest.mark.parametrize("side", ["put", "wait", "get"])
def test_closing_wakes_whoever_waits(side: str) -> None:
    channel: Channel[int] = Channel(1)
    if side != "get":
        channel.put(0, 1)
    seen: list[type[BaseException]] = []

    def wait() -> None:
        try:
            {"put": partial(channel.put, 1, 1), "wait": partial(channel.wait, 1), "get": channel.get}[side]()
        except Closed as error:
            seen.append(type(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive()
    channel.close()
    thread.join(5)
    assert seen == [Closed]


def test_two_runs_are_byte_identical(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        aoconvert.quantize(checkpoints("cogvideox"), "int8dq", output=tmp_path / name, device="cpu", min_quantized=0.1)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) > 8
    for file in files:
        one, two = (tmp_path / "one" / file).read_bytes(), (tmp_path / "two" / file).read_bytes()
        if file.name == "aoconvert.json":
            first, second = json.loads(one), json.loads(two)
            assert first.pop("run") != second.pop("run")
            assert first == second
        else:
            assert one == two, file


@pytest.mark.parametrize("family", ["llama-tied", "mixtral"])
def test_shards(family: str, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    source = checkpoints(family)
    aoconvert.quantize(source, "int8wo", output=whole, device="cpu", min_quantized=0)
    result = aoconvert.quantize(source, "int8wo", output=parts, device="cpu", min_quantized=0, max_shard_size="12KB")
    index = json.loads((parts / "pytorch_model.bin.index.json").read_text())
    shards = sorted(path.name for path in parts.glob("pytorch_model-*.bin"))
    assert len(shards) > 2
    assert shards == sorted(set(index["weight_map"].values()))
    assert not (parts / "pytorch_model.bin").exists()
    assert {tensor.name for tensor in result.manifest.components[0].tensors if tensor.file} == set(index["weight_map"])
    one = AutoModelForCausalLM.from_pretrained(whole)
    other = AutoModelForCausalLM.from_pretrained(parts)
    ids = torch.arange(1, 9).reshape(1, 8)
    with torch.no_grad():
        assert torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)


def test_nan_stops_everything(tmp_path: Path) -> None:
    """A bad weight in the middle: its name, and nothing left on the disk."""
    from helpers import tiny

    source = tmp_path / "source"
    model = tiny.sd3_transformer().bfloat16()
    with torch.no_grad():
        model.transformer_blocks[1].attn.to_q.weight[3, 3] = torch.nan
    model.save_pretrained(source)
    with pytest.raises(QuantizeError, match=r"transformer_blocks\.1\.attn\.to_q\.weight holds NaN"):
        aoconvert.quantize(source, "int8wo", output=tmp_path / "out", device="cpu")
    assert left_behind(tmp_path) == ["source"]


def test_a_source_that_shrinks_after_the_plan(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    from aoconvert.engine.convert import run
    from aoconvert.progress import Silent

    source = tmp_path / "source"
    shutil.copytree(checkpoints("llama-tied"), source)
    plan = build_plan(resolve(str(source)), QuantizeOptions("int8wo", output=tmp_path / "out", device="cpu"))
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2000])
    with pytest.raises((ReadError, aoconvert.SourceError), match=r"model\.safetensors"):
        run(plan, Silent(), command="")
    assert left_behind(tmp_path) == ["source"]


def test_a_full_disk(checkpoints: Callable[[str], Path], tmp_path: Path, forker: Forker) -> None:
    """A file size limit makes write(2) fail in the middle, as a full disk does. What is finished stays."""
    script = (
        "import resource, signal, sys, aoconvert\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))\n"
        "try:\n    aoconvert.quantize(sys.argv[1], 'int8wo', output=sys.argv[2], device='cpu')\n"
        "except aoconvert.WriteError as error:\n    print('WriteError', error, error.hint)\n"
    )
    done = forker.run(["-c", script, str(checkpoints("cogvideox")), str(tmp_path / "out")], WITH_LIBRARIES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("WriteError"), done.stdout
    assert "diffusion_pytorch_model.bin" in done.stdout
    assert re.search(r"free space on this disk.*; the same command continues: \d+ of \d+ tensors are kept", done.stdout)
    assert left_behind(tmp_path) == [".out.aoconvert-partial"]
    assert issubclass(WriteError, aoconvert.AoconvertError)


def test_progress_sees_every_byte(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    class Watch:
        def __init__(self) -> None:
            self.stages: dict[str, list[int]] = {}
            self.now = ""
            self.names: set[str] = set()

        def start(self, stage: str, total_bytes: int) -> None:
            self.now = stage
            self.stages[stage] = [total_bytes, 0]

        def advance(self, nbytes: int, current: str = "") -> None:
            self.stages[self.now][1] += nbytes
            self.names.add(current)

        def finish(self) -> None:
            self.now = ""

    watch = Watch()
    result = aoconvert.quantize(
        checkpoints("flux"), "int8wo", output=tmp_path / "out", device="cpu", progress=watch, min_quantized=0.1
    )
    assert set(watch.stages) == {"quantize", "copy"}
    for total, seen in watch.stages.values():
        assert total == seen > 0
    assert {tensor.name for tensor in result.manifest.components[0].tensors} <= watch.names
