"""What a model is for, which decides what is compared."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from aoconvert.checkpoint.checkpoint import Checkpoint, Part
from aoconvert.checkpoint.evaluation import Task
from aoconvert.errors import PlanError

# transformers' own lists of classes (models/auto/modeling_auto.py), and what their logits are over
_LISTS: Mapping[str, Task] = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "causal-lm",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "seq2seq",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "causal-lm",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "classifier",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "classifier",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "classifier",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "classifier",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES": "classifier",
}
_AUTO_CLASSES: Mapping[str, Task] = {
    "AutoModelForCausalLM": "causal-lm",
    "AutoModelForSeq2SeqLM": "seq2seq",
    "AutoModelForImageTextToText": "causal-lm",
    "AutoModelForSequenceClassification": "classifier",
    "AutoModelForTokenClassification": "classifier",
    "AutoModelForMaskedLM": "classifier",
}


def tasks_of(target: Checkpoint) -> dict[str, Task]:
    """Find the task of each quantized part, by its name.

    Raises:
        PlanError: a file of tensors alone, or a model of which nobody knows what it is for.
    """
    if target.kind == "state_dict":
        raise PlanError([f"{target.folder} is a file of tensors alone: nothing says which model it is for"])
    return {part.name: task_of(part) for part in target.parts}


def task_of(part: Part) -> Task:
    """Find a model's task, by the lists of the library that it belongs to; what is in none of them is an encoder."""
    if part.library == "diffusers":
        return "denoiser"
    if part.auto_class is not None:
        return _AUTO_CLASSES.get(part.auto_class, "encoder")
    modeling_auto = importlib.import_module("transformers.models.auto.modeling_auto")
    encoder_decoder = bool(part.config.get("is_encoder_decoder"))
    for name, task in _LISTS.items():
        if _holds(getattr(modeling_auto, name, {}), part.class_name) and (task != "causal-lm" or not encoder_decoder):
            return task
    return "encoder"


def _holds(classes: Mapping[str, Any], class_name: str) -> bool:
    """Whether a class is in a list, alone or among several of a model type."""
    return any(class_name == found or (isinstance(found, tuple) and class_name in found) for found in classes.values())
