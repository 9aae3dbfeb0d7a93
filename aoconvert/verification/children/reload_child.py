"""Runs in a fresh interpreter, without aoconvert: opens the checkpoint with the code a user is given, and looks at it.

Reads one JSON request from stdin: ``code`` (which leaves ``pipe`` or ``model``), ``folder`` (the checkpoint), ``parts``
(name → ``{tensor: [class, sha256]}`` of what must be quantized, hashes null without a manifest), ``reports`` (name →
``{"folder", "kwargs"}`` of the models of which the library's loading report is wanted), ``places`` (name → folder of
the model), ``forward``, ``example`` (code that uses what was opened, or null). Writes JSON lines: ``{"loaded": ...,
"opened": [...]}`` (files of weights in the folder), ``{"part": ..., "problems": [...], "tensors": {name: [dtype,
sha256]}}`` (of what is not quantized), ``{"part": ..., "report": ...}``, ``{"part": ..., "forward": {"status",
"detail", "output_sqnr_db", "inputs"}}``, ``{"error": ...}``.

``originals`` (name → ``{"library", "module", "class_name", "auto_class", "folder", "variant", "dtype", "trust"}``) are
opened one at a time, where there is memory for one beside the result, and take the same forward pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Answer the request on stdin; what the checkpoint's own code prints is kept off the answers."""
    request = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        answer(request)


def answer(request: dict[str, Any]) -> None:
    """Open the checkpoint, and say what it is."""
    names: dict[str, Any] = {}
    opened = watch(request["folder"])
    try:
        exec(compile(request["code"], "<load code>", "exec"), names)
        whole: Any = names.get("pipe", names.get("model"))
        models = {part: getattr(whole, part) if part else whole for part in request["parts"]}
    except Exception as error:
        say({"error": root_cause(error)})
        return
    say({"loaded": type(whole).__name__, "opened": sorted(opened | find_mapped(request["folder"]))})
    for part, expected in request["parts"].items():
        say({"part": part, "problems": compare(models[part], expected), "tensors": plain(models[part], expected)})
    for part, how in request["reports"].items():
        say({"part": part, "report": report(models[part], **how)})
    if request["forward"]:
        forward = sibling("forward_pass")
        handed = forward.hand_out(whole, models)
        for part, model in models.items():
            found = request["originals"].get(part), request["places"][part], handed.get(part)
            say({"part": part, "forward": forward.attempt_forward(model, *found)})
    if request["example"] is not None:
        say({"example": True, "forward": attempt_example(request["example"], names)})


_WEIGHTS = (".bin", ".safetensors", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".pkl", ".npz")


def watch(folder: str) -> set[str]:
    """A set that from now on takes in each file of weights in the folder that Python opens, by its relative path."""
    found: set[str] = set()
    root = Path(folder).resolve()

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[0].endswith(_WEIGHTS):
            path = Path(arguments[0])  # a link in the folder counts as the file that it is there
            path = path.parent.resolve() / path.name
            if path.is_relative_to(root):
                found.add(path.relative_to(root).as_posix())

    sys.addaudithook(look)
    return found


def find_mapped(folder: str) -> set[str]:
    """The files of weights in the folder that are mapped: safetensors opens its files without Python."""
    root, maps = f"{Path(folder).resolve()}/", Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8", errors="replace").splitlines() if maps.is_file() else []
    paths = {line.split(maxsplit=5)[5] for line in lines if line.endswith(_WEIGHTS)}
    return {path.removeprefix(root) for path in paths if path.startswith(root)}


def report(model: Any, folder: str, kwargs: dict[str, Any]) -> dict[str, list[str]]:
    """The library's own report of loading the model: what it found no tensor for, and what it had to leave out."""
    options = {key: getattr(torch, value) if key == "torch_dtype" else value for key, value in kwargs.items()}
    _, found = type(model).from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    return {key: sorted(str(name) for name in found.get(key) or ()) for key in ("missing_keys", "mismatched_keys")}


def root_cause(error: BaseException) -> str:
    """The first error of the chain: diffusers hides an UnpicklingError behind an OSError."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def compare(model: Any, expected: dict[str, list[str | None]]) -> list[str]:
    """What differs from what was written, and what has no data."""
    problems = []
    state = model.state_dict()
    digests: dict[Any, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            problems.append(f"{name} is on meta")
    for name, (class_name, sha256) in expected.items():
        tensor = state.get(name)
        if tensor is None:
            problems.append(f"{name} is not in the model")
            continue
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        if kind != class_name:
            problems.append(f"{name} is a {type(tensor).__name__}, not a {str(class_name).rpartition('.')[2]}")
        elif sha256 is not None and digest_of(tensor, digests) != sha256:
            problems.append(f"{name} changed while it was loaded")
    return problems


def digest_of(tensor: Any, known: dict[Any, str]) -> str:
    """Its content hash; what has many names is read once."""
    key = place(tensor)
    if key not in known:
        known[key] = content(tensor).hexdigest()
    return known[key]


def place(tensor: Any) -> tuple[Any, ...]:
    """Where in memory the elements lie: the same for tensors that share all of them."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    return tuple(place(getattr(tensor, name)) for name in flatten()[0])


def plain(model: Any, expected: dict[str, Any]) -> dict[str, list[str]]:
    """Dtype and content hash of every tensor of the state dict that is not quantized."""
    digests: dict[Any, str] = {}
    return {
        name: [str(tensor.dtype).removeprefix("torch."), digest_of(tensor, digests)]
        for name, tensor in model.state_dict().items()
        if name not in expected and isinstance(tensor, torch.Tensor) and not tensor.is_meta
    }


def content(tensor: Any, digest: Any = None) -> Any:
    """SHA-256 over the inner tensors' bytes, in order."""
    digest = hashlib.sha256() if digest is None else digest
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        for name in flatten()[0]:
            content(getattr(tensor, name), digest)
    elif tensor.numel():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest


def attempt_example(code: str, names: dict[str, Any]) -> dict[str, str]:
    """Run the example of the model card where the load code left off; what it prints or writes is not kept."""
    torch.manual_seed(0)
    try:
        exec(compile(code, "<example>", "exec"), names)
    except ImportError as error:  # writing a video takes a package that opening the checkpoint does not
        return {"status": "skipped", "detail": f"the card's example was not run: {root_cause(error)}"}
    except Exception as error:
        return {"status": "failed", "detail": f"the card's example failed: {root_cause(error)}"}
    return {"status": "passed", "detail": "the card's example ran"}


def sibling(name: str) -> Any:
    """A module beside this one; an isolated interpreter does not look here."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def say(value: dict[str, Any]) -> None:
    """One line of the answer, also while what is printed is kept off it."""
    sys.__stdout__.write(json.dumps(value) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
