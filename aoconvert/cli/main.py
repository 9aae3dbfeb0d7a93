"""The entry point: commands are found by name and imported when they are needed, errors become one line."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import logging
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Any, NoReturn

import click

from aoconvert.cli.output import Output
from aoconvert.cli.streams import give_up_stdout, write_stderr
from aoconvert.errors import CHECK_PERMISSIONS, AoconvertError, HostMemoryError, Interrupted, is_out_of_memory
from aoconvert.humanize import escape
from aoconvert.version import __version__

# name → one-line help; the module of the same name in this package holds the command
_COMMANDS = {
    "quantize": "Quantize a checkpoint into a torchao checkpoint.",
    "plan": "Show what quantize would do, and write nothing.",
    "migrate": "Rewrite an old torchao or Quanto checkpoint in today's tensor classes.",
    "convert": "Write a checkpoint's tensors into the other format of weights files.",
    "repack": "Pack the int4 weights of a checkpoint for another device.",
    "verify": "Prove that a converted checkpoint loads.",
    "bench": "Measure what a converted checkpoint costs to run: memory and time.",
    "eval": "Show how much a converted checkpoint lost, beside its original.",
    "card": "Print the model card of a converted checkpoint, or write it.",
    "push": "Publish a converted checkpoint on the Hugging Face Hub.",
    "release": "Make every variant of a release file: quantize, verify, judge, publish.",
    "inspect": "Show what a checkpoint is and what can load it, from headers alone.",
    "diff": "Show what differs between two checkpoints, or a checkpoint and its source.",
    "schemes": "List the quantization schemes, or show one.",
    "env": "Show what aoconvert would run with here: versions, devices, caches.",
    "cache": "Show where aoconvert's cache is and how large it is, or clear it.",
    "demo": "Build, quantize and verify a tiny pipeline, without a network.",
}
_MODULES = {"eval": "evaluate"}  # a command whose name its module does not have
_TAKE_TOKEN = {"quantize", "plan", "migrate", "verify", "bench", "eval", "push", "release", "inspect", "diff"}


class _Commands(click.Group):
    """Imports a command's module when it is called; ``--help`` imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"aoconvert.cli.{_MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            close = difflib.get_close_matches(args[0], _COMMANDS)
            if args[0] in _COMMANDS or not close:
                raise
            meant = " or ".join(close)
            raise click.UsageError(f"{error.message.rstrip('.')}: did you mean {meant}?", ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would print an empty line
            raise Interrupted("interrupted") from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


def version_line() -> str:
    """Our version, and of what decides the bytes that are written; imports neither."""
    from aoconvert.environment import version_of

    others = ", ".join(f"{name} {version_of(name) or 'not installed'}" for name in ("torch", "torchao"))
    return f"aoconvert, version {__version__} ({others})"


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 ok, 1 failed, 2 usage, 3 refused before any work, 4 verification failed, "
    "5 Hub or authentication, 130 interrupted.",
)
@click.version_option(message=version_line())
def cli() -> None:
    """Turn a diffusers or transformers checkpoint into a torchao checkpoint, one tensor at a time."""


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit. ``AOCONVERT_DEBUG=1`` shows tracebacks."""
    if argv is None:
        hide_token()
    arguments = sys.argv[1:] if argv is None else argv
    out = Output.from_flags(json_mode="--json" in arguments)
    signal.signal(signal.SIGTERM, _terminate)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Formatter())
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show is escaped, no error
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(args=arguments, prog_name="aoconvert", standalone_mode=False)
        if sys.stdout is None:  # what click prints, as --help, goes nowhere without a word
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _fail(out, Interrupted("interrupted"))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"see {context.command_path} --help" if context is not None else None
        wrong = error.format_message()
        out.error(type(error).__name__, wrong, hint, error.exit_code, problems=[wrong], retryable=False)
        sys.exit(error.exit_code)
    except AoconvertError as error:
        _fail(out, error)
    except Exception as error:
        if isinstance(error, OSError) and _comes_from_click(error):  # it printed --help, and stdout is full
            give_up_stdout()
            sys.exit(1)
        if is_out_of_memory(error):
            hint = "close other programs or raise the limit; aoconvert plan shows how much memory a run needs"
            _fail(out, HostMemoryError("out of memory", hint=hint))
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            hint = f"{CHECK_PERMISSIONS}; AOCONVERT_DEBUG=1 shows the traceback"
            _fail(out, AoconvertError(f"{error.filename}: {error.strerror}", hint=hint))
        from aoconvert.sources.hub_errors import without_secrets

        said = without_secrets(str(error)).splitlines()
        _fail(
            out,
            AoconvertError(
                f"unexpected {type(error).__name__}: {said[0] if said else ''}",
                hint="AOCONVERT_DEBUG=1 shows the traceback; please report this",
            ),
        )


class _Formatter(logging.Formatter):
    """What is logged may hold names from outside."""

    def format(self, record: logging.LogRecord) -> str:
        return escape(" ".join(super().format(record).split()))


def _comes_from_click(error: Exception) -> bool:
    """Whether an error comes out of click's own code."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__")).startswith("click.")


def hide_token() -> None:
    """Start this command line again without ``--token X``, which every user of the machine could read in its process.

    The token goes by ``HF_TOKEN``, which ``--token`` reads. Nothing happens where no token is given in this way.
    """
    arguments, token = _without_token(sys.argv[1:])
    # what stands before our arguments: the interpreter, its options, the script
    before = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    if not set(sys.argv[1:2]) & _TAKE_TOKEN:
        return
    if not token or os.name == "nt" or not sys.executable or sys.orig_argv[len(before) :] != sys.argv[1:]:
        return
    with contextlib.suppress(OSError):
        os.execve(sys.executable, [*before, *arguments], {**os.environ, "HF_TOKEN": token})


def _without_token(arguments: list[str]) -> tuple[list[str], str | None]:
    """Separate ``--token`` from the other arguments, and return both; what follows ``--`` is not an option."""
    kept: list[str] = []
    token = None
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            return [*kept, argument, *rest], token
        if argument == "--token":
            token = next(rest, None)
            if token is None:
                return arguments, None
        elif argument.startswith("--token="):
            token = argument.removeprefix("--token=")
        else:
            kept.append(argument)
    return kept, token


def _fail(out: Output, error: AoconvertError) -> NoReturn:
    if os.environ.get("AOCONVERT_DEBUG") == "1":
        from aoconvert.sources.hub_errors import without_secrets

        write_stderr(without_secrets(traceback.format_exc()))
    out.error(
        type(error).__name__,
        error.message,
        error.hint,
        error.exit_code,
        problems=error.problems,
        retryable=error.retryable,
    )
    sys.exit(error.exit_code)


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM takes the same way out as Ctrl-C: what is finished stays for the next run."""
    raise KeyboardInterrupt
