"""What a job runs: ``python -m aoconvert.releasing.engines.hf_jobs.in_job``.

It makes the release on the machine's own disk, from the mounted sources, and keeps what is whole in the bucket.
It prints what ``release --json`` prints, and exits with the same code.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from aoconvert.errors import AoconvertError, Interrupted
from aoconvert.options.release import ReleaseOptions
from aoconvert.releasing.engines.hf_jobs.keep import Keeper
from aoconvert.releasing.engines.hf_jobs.lines import to_lines
from aoconvert.releasing.engines.hf_jobs.order import BUCKET_VARIABLE, CACHE_VARIABLE, ORDER_VARIABLE, Order, Pin
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
        order = Order.model_validate_json(os.environ[ORDER_VARIABLE])
        bucket, cache = Path(os.environ[BUCKET_VARIABLE]), Path(os.environ[CACHE_VARIABLE])
        record = carry_out(order, Path.cwd() / "aoconvert-job", bucket, cache)
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


def carry_out(order: Order, work: Path, bucket: Path, cache: Path) -> Record:
    """Make a release from an order.

    Args:
        order: the files and the options.
        work: a folder for it on the machine's disk.
        bucket: where what is whole is kept.
        cache: the Hub client's cache, with the sources' commits in their places.
    """
    path = _write(order, work)
    for pin in order.pins:
        _note_revision(pin, cache)
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


def _note_revision(pin: Pin, cache: Path) -> None:
    """Tell the Hub client which commit a branch means, as it notes that itself."""
    if pin.revision != pin.commit:
        place = cache / pin.folder / "refs" / pin.revision
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(pin.commit)


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
