"""What a job runs: ``python -m aoconvert.releasing.engines.hf_jobs.in_job``.

It makes the release on the machine's own disk, from the mounted sources, and keeps what is whole in the bucket.
It prints what ``release --json`` prints, and exits with the same code.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from aoconvert.errors import AoconvertError, Interrupted, UsageError
from aoconvert.options.release import ReleaseOptions
from aoconvert.releasing.engines.hf_jobs.keep import Keeper
from aoconvert.releasing.engines.hf_jobs.lines import to_lines
from aoconvert.releasing.engines.hf_jobs.order import BUCKET_VARIABLE, ORDER_VARIABLE, SOURCES_VARIABLE, Order, Pin
from aoconvert.releasing.record import Record
from aoconvert.releasing.release import release
from aoconvert.releasing.release_file import load
from aoconvert.releasing.variants import list_variants, root_of

# after these a variant has more files than before; "quantized" is where most of the work is done
_KEPT_AFTER = frozenset({"quantized", "verified", "evaluated", "gate_failed", "pushed", "unchanged", "failed"})


def main() -> int:
    """Carry out the order that the environment holds; gives the exit code of ``release``."""
    signal.signal(signal.SIGTERM, _stop)
    _say({"event": "job_started"})
    try:
        order = Order.model_validate_json(_told(ORDER_VARIABLE))
        bucket, sources = Path(_told(BUCKET_VARIABLE)), Path(_told(SOURCES_VARIABLE))
        here = Path.cwd() if os.access(Path.cwd(), os.W_OK) else Path(tempfile.gettempdir())
        record = carry_out(order, here / "aoconvert-job", bucket, sources)
    except (Interrupted, KeyboardInterrupt):
        return _fail(Interrupted("stopped", hint="run the same command again: it goes on from the bucket"))
    except AoconvertError as error:
        return _fail(error)
    except Exception as error:
        from aoconvert.sources.hub_errors import without_secrets

        sys.stderr.write(without_secrets(traceback.format_exc()))
        return _fail(AoconvertError(f"unexpected {type(error).__name__}", hint="the log has the traceback"))
    _say({"event": "summary", **record.to_dict()})
    return record.exit_code


def _told(name: str) -> str:
    if (value := os.environ.get(name)) is None:
        raise UsageError(f"{name} is not set", hint="aoconvert release --engine hf-jobs starts this in a job")
    return value


def carry_out(order: Order, work: Path, bucket: Path, sources: Path) -> Record:
    """Make a release from an order.

    Args:
        order: the files and the options.
        work: a folder for it on the machine's disk.
        bucket: where what is whole is kept.
        sources: the sources' commits, each a folder.
    """
    path, cache = _write(order, work), work / "hub"
    for pin in order.pins:
        _put_in_cache(pin, sources / pin.place, cache)
    options = {
        **order.options.model_dump(),
        "output_root": work / "out",
        "cache_dir": cache,
        "local_files_only": True,  # what is not mounted would be fetched, and paid for, without a word
    }
    wanted = ReleaseOptions(**options)
    root = root_of(path, wanted)
    names = [each.folder.name for each in list_variants(path, load(path), wanted)]
    keeper = Keeper(root, bucket / root.name, names)
    _say({"event": "restored", "variants": keeper.restore()})

    def on_event(event: dict[str, Any]) -> None:
        _say(event)
        if event["event"] in _KEPT_AFTER:
            keeper.keep()

    record = release(path, on_event=on_event, **options)
    keeper.keep()
    return record


def _write(order: Order, work: Path) -> Path:
    """The release file, with the recipes beside it."""
    for name, text in order.files.items():
        place = work / "files" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    return work / "files" / order.path


def _put_in_cache(pin: Pin, folder: Path, cache: Path) -> None:
    """Let the Hub client find a commit, and which one a branch means, as if it had fetched it.

    See https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
    """
    repo = cache / f"models--{pin.repo_id.replace('/', '--')}"
    snapshot, ref = repo / "snapshots" / pin.commit, repo / "refs" / pin.revision
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    if not snapshot.is_symlink():
        snapshot.symlink_to(folder, target_is_directory=True)
    if pin.revision != pin.commit:
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(pin.commit)


def _say(document: dict[str, Any]) -> None:
    for line in to_lines(document):
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _fail(error: AoconvertError) -> int:
    _say(
        {
            "error": {
                "type": type(error).__name__,
                "message": error.message,
                "hint": error.hint,
                "exit_code": error.exit_code,
                "retryable": error.retryable,
                "problems": list(error.problems),
            }
        }
    )
    return error.exit_code


def _stop(number: int, frame: FrameType | None) -> None:
    """A job that is cancelled or out of time: what is whole is in the bucket already."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
