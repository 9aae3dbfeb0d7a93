"""The code that opens a checkpoint: what a model card shows is what ``verify`` executes.

Every value that goes into it was checked by ``target`` and is written as a Python literal.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from aoconvert.checkpoint.checkpoint import Checkpoint, Part
from aoconvert.checkpoint.files import LOADED
from aoconvert.checkpoint.report import Strategy, proven_strategy
from aoconvert.formats.registry import SAFETENSORS
from aoconvert.models.fused import FUSED


@dataclass
class _Program:
    """Lines of Python: its imports, and what comes after them."""

    imports: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)

    def text(self) -> str:
        return "\n".join([*self.imports, "", *self.body]) + "\n"


def load_code(
    target: Checkpoint,
    place: str,
    strategy: Strategy,
    *,
    device: str | None = None,
    hub: bool = False,
    revision: str | None = None,
) -> str:
    """Python that leaves the pipeline in ``pipe``, or the model in ``model``.

    Args:
        target: the checkpoint.
        place: folder that the code shall open, or with ``hub`` a repo id.
        strategy: ``from-pretrained``: plain library code. ``assign``: an empty model from the config, and
            ``load_state_dict(assign=True)``, for what the libraries cannot open themselves.
        device: where the model goes; by default the device that its layout is for, or a GPU where there is one.
        hub: ``place`` is a repo id; it is downloaded first where the library would not fetch all that it needs.
        revision: of the repo, where it is not the default branch.
    """
    program = _Program(["import torch", *(f"import {name}" for name in target.imports)])
    program.body.append(f"device = {_device(target, device)}")
    opened = repr(place) if revision is None else f"{place!r}, revision={revision!r}"
    whole = hub and (strategy == "assign" or two_formats(target))
    if whole:
        program.imports.append("from huggingface_hub import snapshot_download")
    if strategy == "assign":
        _assign(program, target, f"snapshot_download({opened})" if whole else opened)
    elif whole:
        program.body.append(
            "# all files: diffusers itself would fetch either the safetensors or the .bin files of a pipeline, not both"
        )
        program.body.append(f"folder = snapshot_download({opened})")
        _from_pretrained(program, target, "folder")
    else:
        _from_pretrained(program, target, opened)
    program.body.append(f"{'pipe' if target.kind == 'pipeline' else 'model'}.to(device)")
    return program.text()


def two_formats(target: Checkpoint) -> bool:
    """Whether a pipeline's weights are in safetensors and in ``.bin`` files.

    diffusers (``pipeline_loading_utils.is_safetensors_compatible``) then fetches only one kind from the Hub.
    """
    if target.kind != "pipeline":
        return False
    if target.manifest is not None:
        paths = [file.path for file in target.manifest.files()]
    else:
        paths = [path.as_posix() for path in target.folder.rglob("*")]
    kinds = {path.rpartition(".")[2] for path in paths if LOADED.fullmatch(path.rpartition("/")[2])}
    return {"safetensors", "bin"} <= kinds


def card_strategy(target: Checkpoint) -> Strategy:
    """The way of loading that a card shows: the one that the last verification of this manifest proved, if any."""
    manifest = target.manifest
    ways = {entry.load.strategy for entry in manifest.components} if manifest is not None else set()
    usual: Strategy = "assign" if "assign" in ways else "from-pretrained"
    return proven_strategy(target.folder) or usual


def code_sha256(target: Checkpoint, strategy: Strategy) -> str:
    """SHA-256 (hex) of the load code before place and device are filled in: by it a card knows that it was proven."""
    return hashlib.sha256(load_code(target, "", strategy).encode()).hexdigest()


def code_device(target: Checkpoint) -> str | None:
    """The device that the code names: the one that weights are packed for; ``None`` where it takes what is there."""
    layouts = [entry.layout for entry in target.manifest.components] if target.manifest is not None else []
    return next((layout.device for layout in layouts if layout.device != "any"), None)


def _device(target: Checkpoint, device: str | None) -> str:
    """The device as Python: the one that the weights are packed for, or a GPU that they can run on."""
    layouts = [entry.layout for entry in target.manifest.components] if target.manifest is not None else []
    device = device or code_device(target)
    if device is not None:
        return repr(device)
    least = max((tuple(layout.min_capability) for layout in layouts if layout.min_capability), default=None)
    able = f" and torch.cuda.get_device_capability() >= {least}" if least else ""
    return f'"cuda" if torch.cuda.is_available(){able} else "cpu"'


def _from_pretrained(program: _Program, target: Checkpoint, opened: str) -> None:
    if target.kind == "pipeline":
        program.imports.append("from diffusers import DiffusionPipeline")
        arguments = "".join(f", {item}" for item in (*_dtype(target), *_file_format(target), *_trust(target)))
        program.body.append(f"pipe = DiffusionPipeline.from_pretrained({opened}{arguments})")
        return
    [part] = target.parts
    arguments = "".join(f", {item}" for item in _kwargs(part))
    program.imports.append(_import(part))
    program.body.append(f"model = {part.auto_class or part.class_name}.from_pretrained({opened}{arguments})")


def _import(part: Part) -> str:
    module = part.library if part.module is None else f"diffusers.pipelines.{part.module}"
    return f"from {module} import {part.auto_class or part.class_name}"


def _assign(program: _Program, target: Checkpoint, folder: str) -> None:
    program.imports.append("from accelerate import init_empty_weights")
    program.imports += sorted({_import(part) for part in target.parts})
    if any(SAFETENSORS.writes(path) for part in target.parts for path in part.files):
        program.imports.insert(0, "import json")
        program.imports += [
            "from safetensors import safe_open",
            "from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict",
        ]
    if any(part.library == "transformers" and part.module is None for part in target.parts):
        program.imports.append("from transformers import AutoConfig")
    if target.kind == "pipeline":
        program.imports.append(f"from diffusers import {target.class_name}")
    program.body.append(f"folder = {folder}")
    for part in target.parts:
        program.body += ["", *_assign_part(part)]
    if target.kind == "pipeline":
        given = "".join(f", {part.name}={part.name}" for part in target.parts)
        arguments = "".join(f", {item}" for item in (*_dtype(target), *_trust(target)))
        # not DiffusionPipeline: diffusers 0.42 then loads what is optional in a pipeline's class again (Wan's model)
        program.body += ["", f"pipe = {target.class_name}.from_pretrained(folder{given}{arguments})"]


def _assign_part(part: Part) -> list[str]:
    variable = part.name or "model"
    folder = f"folder + {'/' + part.folder!r}" if part.folder else "folder"
    if part.library == "diffusers":
        lines = [
            f"config = {part.class_name}.load_config({folder})",
            "with init_empty_weights():",
            f"    {variable} = {part.class_name}.from_config(config)",
        ]
    else:
        trust = ", trust_remote_code=True" if part.runs_code else ""
        made = f"{part.class_name}(config)"
        if part.auto_class is not None:
            made = f"{part.auto_class}.from_config(config{trust})"
        reader = "AutoConfig" if part.module is None else f"{part.class_name}.config_class"
        lines = [
            f"config = {reader}.from_pretrained({folder}{trust})",
            "with init_empty_weights():",
            f"    {variable} = {made}",
        ]
    if part.fused:
        lines += _fuse(variable)
    lines += ["state = {}"]
    # no f-string in the program: a brace in a file's name would be code there
    for path in part.files:
        place = f"folder + {'/' + path!r}"
        if SAFETENSORS.writes(path):
            lines += _update_from_safetensors(place)
        else:
            lines += [f"state.update(torch.load({place}, weights_only=True, mmap=True))"]
    if any(entry.action == "carry" for entry in (part.tensors or {}).values()):
        # of the source, and not of the model class: other loaders use them
        lines += [f"state = {{name: state[name] for name in {variable}.state_dict() if name in state}}"]
    if part.library == "transformers":
        # tensors that are tied are in the file once; if both are there they differ, and stay apart
        lines += [
            f"absent = {variable}.state_dict().keys() - state.keys()",
            f"for name, origin in {variable}.all_tied_weights_keys.items():",
            "    state.setdefault(name, state[origin])",
        ]
    lines += [f"{variable}.load_state_dict(state, strict=True, assign=True)"]
    if part.library == "transformers":
        lines += [f"{variable}.tie_weights(missing_keys=absent, recompute_mapping=False)"]
    lines += [f"{variable}.eval()"]
    return lines


def _update_from_safetensors(place: str) -> list[str]:
    """What diffusers itself does: torchao's reader takes no name without a dot, and a model's own tensors have none."""
    return [
        f"with safe_open({place}, framework='pt') as file:",
        "    metadata, stored = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}",
        "state.update({name: stored.pop(name) for name in list(stored) if '.' not in name})",
        "names = [name for name in json.loads(metadata['tensor_names']) if '.' in name]",
        "metadata['tensor_names'] = json.dumps(names)",
        "state.update(unflatten_tensor_state_dict(stored, metadata)[0])",
    ]


def _fuse(variable: str) -> list[str]:
    """What :func:`aoconvert.models.fused.fuse` does: fuse, and take out the layers that are not used any more."""
    return [
        f"{variable}.fuse_qkv_projections()",
        f"for module in {variable}.modules():",
        f"    for fused, parts in {dict(FUSED)!r}.items():",
        "        if hasattr(module, fused) and hasattr(module, parts[0]):",
        "            for part in parts:",
        "                delattr(module, part)",
    ]


def _dtype(target: Checkpoint) -> list[str]:
    dtypes = {str(part.kwargs["torch_dtype"]) for part in target.parts if "torch_dtype" in part.kwargs}
    dtypes |= {part.dtype for part in target.parts if part.dtype is not None}
    return [f"torch_dtype=torch.{dtypes.pop()}"] if len(dtypes) == 1 else []


def _trust(target: Checkpoint) -> list[str]:
    """Code inside the checkpoint runs only where somebody says so."""
    return ["trust_remote_code=True"] if target.runs_code else []


def _file_format(target: Checkpoint) -> list[str]:
    """diffusers finds a sharded .bin only when it is told to look for one, in any of a pipeline's parts."""
    return ["use_safetensors=False"] if any("use_safetensors" in part.kwargs for part in target.parts) else []


def _kwargs(part: Part) -> list[str]:
    items = []
    for name, value in part.kwargs.items():
        items.append(f"torch_dtype=torch.{value}" if name == "torch_dtype" else f"{name}={value!r}")
    return items
