"""Code inside the checkpoint: found where ``auto_map`` says, run only where it was allowed, refused in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny  # noqa: F401  (its imports come first)
from safetensors.torch import save_file

import aoconvert
from aoconvert.errors import AoconvertError, SourceError

CONFIG = """
from transformers import PreTrainedConfig

class OwnConfig(PreTrainedConfig):
    model_type = "{kind}"

    def __init__(self, width=64, **kwargs):
        super().__init__(**kwargs)
        self.width = width
"""

LAYERS = """
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return self.inner(x)
"""

MODEL = """
from torch import nn
from transformers import PreTrainedModel

from .configuration_own import OwnConfig
from .layers_own import Block

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    main_input_name = "x"

    def __init__(self, config):
        super().__init__(config)
        self.block = Block(config.width)
        self.head = nn.Linear(config.width, 2)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, x):
        return self.head(self.block(x))
"""

FILES = {"configuration_own.py": CONFIG, "layers_own.py": LAYERS, "modeling_own.py": MODEL}


def own(folder: Path, *, at: str = "", architecture: str = "OwnModel", **auto_map: str) -> Path:
    """A checkpoint with its own code, in a subfolder ``at`` or beside the config."""
    folder.mkdir(parents=True)
    (folder / at).mkdir(exist_ok=True)
    for name, text in FILES.items():
        (folder / at / name).write_text(text.replace("{kind}", f"own-{folder.parent.name}"))
    prefix = f"{at}/" if at else ""
    usual = {"AutoConfig": f"{prefix}configuration_own.OwnConfig", "AutoModel": f"{prefix}modeling_own.OwnModel"}
    values: Mapping[str, Any] = {
        "architectures": [architecture],
        "model_type": f"own-{folder.parent.name}",
        "auto_map": {**usual, **auto_map},
        "width": 64,
    }
    (folder / "config.json").write_text(json.dumps(values))
    generator = torch.Generator().manual_seed(0)
    state = {
        "block.inner.weight": torch.randn(64, 64, generator=generator),
        "block.inner.bias": torch.zeros(64),
        "head.weight": torch.randn(2, 64, generator=generator),
        "head.bias": torch.zeros(2),
    }
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def actions(folder: Path, **options: Any) -> dict[str, str]:
    made = aoconvert.plan(folder, "int8wo", output=folder.parent / "out", device="cpu", **options)
    return {tensor.name: tensor.action for tensor in made.components[0].tensors}


EXPECTED = {
    "block.inner.weight": "quantize",
    "block.inner.bias": "cast",
    "head.weight": "quantize",
    "head.bias": "cast",
}


@pytest.mark.parametrize("at", ["", "code"])
@pytest.mark.parametrize("architecture", ["OwnModel", "NameOfBefore"])
def test_code_is_found_with_its_relative_imports(at: str, architecture: str, tmp_path: Path) -> None:
    """Also in a subfolder, and where ``architectures`` still has another name than ``auto_map``."""
    assert actions(own(tmp_path / "source", at=at, architecture=architecture), trust_remote_code=True) == EXPECTED


def test_the_code_arrives_and_runs(tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = own(tmp_path / "source")
    aoconvert.quantize(folder, "int8wo", output=tmp_path / "out", device="cpu", trust_remote_code=True)
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == FILES.keys()
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(model.block.inner.weight).__name__ == "Int8Tensor"
    assert model(torch.ones(3, 64, dtype=torch.bfloat16)).shape == (3, 2)


def test_code_is_not_run_unless_that_was_allowed(tmp_path: Path) -> None:
    folder = own(tmp_path / "source")
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(
        SourceError, match=r"OwnModel is defined by code inside the checkpoint \(modeling_own\.OwnModel\)"
    ) as caught:
        actions(folder)
    assert "--trust-remote-code" in str(caught.value.hint)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"AutoModel": "user/other-repo--modeling_own.OwnModel"}, "its code user/other-repo--modeling_own.OwnModel"),
        ({"AutoModel": "modeling_gone.OwnModel"}, "its code modeling_gone.OwnModel cannot be used"),
        ({"AutoModel": "modeling_own.Gone"}, "its code modeling_own.Gone cannot be used"),
        ({"AutoConfig": "configuration_own.Gone"}, ""),
    ],
)
def test_code_that_cannot_be_had_is_one_line(change: dict[str, str], message: str, tmp_path: Path) -> None:
    architecture = change.get("AutoModel", "OwnModel").rpartition(".")[2]
    folder = own(tmp_path / "source", architecture=architecture, **change)
    if not message:  # the model class names its config class itself
        assert actions(folder, trust_remote_code=True) == EXPECTED
        return
    with pytest.raises(AoconvertError, match=message) as caught:
        actions(folder, trust_remote_code=True)
    assert "\n" not in caught.value.message


def test_where_it_may_be_run_it_goes_before_a_class_of_transformers(tmp_path: Path) -> None:
    """As with the auto classes."""
    folder = own(tmp_path / "source", AutoModel="modeling_own.BertModel", architecture="BertModel")
    text = (folder / "modeling_own.py").read_text().replace("OwnModel", "BertModel")
    (folder / "modeling_own.py").write_text(text)
    assert actions(folder, trust_remote_code=True) == EXPECTED
