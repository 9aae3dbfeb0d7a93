"""The template of a card: Jinja2, sandboxed, and every value is escaped for Markdown.

A template of one's own (``--card-template``) is the body only: the front matter is made apart. It gets these variables;
text is escaped where it is written, so no filter is needed for safety:

- ``title``, ``repo_id`` (none: null), ``place`` (what the code opens), ``kind`` (pipeline, diffusers or transformers),
  ``class_name``, ``schemes`` (list), ``picture`` (file name, or null), ``pictured_outputs`` (it shows
  the errors of layers' outputs too), ``license``, ``license_url`` (or null);
- ``source``: ``name``, ``url``, ``revision``, ``revision_url``, ``files`` (as ``files`` below);
- ``code``: ``load``, ``usage`` (or null), ``strategy`` (from-pretrained or assign), ``install`` (a pip command),
  ``packages`` (names), ``to_device`` (what moves it to the device that the code names);
- ``proof``: ``ok`` (this code was run and opened this checkpoint), ``reason`` (why not), ``date``, ``device``,
  ``versions`` (name, version), ``checks`` (name, status, detail), ``example`` (the example was run too), ``forward`` (a
  forward pass was taken), ``not_run`` (the device that the code names, where it was run on another), ``device_code``;
- ``components``: ``name``, ``class_name``, ``scheme``, ``config``, ``weights`` (int8 …), ``granularity``, ``dynamic``
  (activations are quantized too), ``dtype``, ``device``, ``packing``, ``capability``, ``loads_with`` (package, range),
  ``parameters``, ``quantized_parameters``, ``quantized_fraction``, ``layers``, ``bytes_in``, ``bytes_out``,
  ``bits_in``, ``bits_out``, and tables:
  ``schemes`` (``name``, ``weights``, ``granularity``, ``dynamic``, ``tensors``, ``experts``, ``parameters``,
  ``bytes_per_parameter``, ``median``, ``lowest``), ``rules`` (``pattern``, ``scheme``; torchao's ``FqnToConfig``),
  ``what`` (``what``, ``count``, ``parameters``, ``stored``: the quantized weights),
  ``quantized`` (``pattern``, ``count``, ``shape``, ``parameters``, ``sqnr``),
  ``kept`` (``pattern``, ``leaves``, ``count``, ``parameters``, ``stored``, ``reason``), and the same by reason:
  ``groups`` (``what``, ``count``, ``parameters``, ``stored``, ``reason``),
  ``kinds`` (``kind``, ``layers``, ``parameters``, ``median``, ``lowest``),
  ``worst`` (``name``, ``sqnr``, ``shape``);
  ``migrated`` (null, or ``kind``, ``scheme``, ``written_by`` of the old checkpoint, ``carried``, ``dequantized`` and
  ``requantized``: numbers of tensors, ``deviations``: ``reason``, ``count``, ``error``);
  ``converted`` (null, or ``format`` of the files that somebody else wrote, and ``written_by``: torchao's releases);
- ``sizes``: ``rows`` (``name``, ``scheme``, ``bytes_in``, ``bytes_out``, ``bits_in``, ``bits_out``), ``total``;
- ``quality``: of the evaluation, or null: ``components`` (``name``, ``task``, ``rows``: label, original, quantized,
  change, with bfloat16 noise; ``floor``: there are figures with noise; ``worst``: name and output SQNR of layers),
  ``data`` (a text), ``kind``, ``samples``, ``tokens``, ``files`` (name, SHA-256), ``dtype`` of the original,
  ``same_files``, ``size_change`` (a text), ``gates`` (``name``, ``limit``, ``passed``), ``device``,
  ``command`` (or null), ``sheet`` (file name, or null);
- ``costs`` (null without a benchmark of this checkpoint): ``rows`` (keys of ``aoconvert.bench.json``, and ``mode``,
  ``time``, ``rate``: texts), ``modes`` (one is not plain), ``batches`` (one is not 1),
  ``more`` (rows that are not shown), ``failures`` (rows with an ``error``),
  ``date``, ``complete``, ``runs``, ``environment`` (name → value), ``compiled``,
  ``small`` (a pipeline ran at its smallest size), ``command`` (or null);
- ``siblings`` (null without a release's record, or without another variant in it): ``name`` of the release, ``rows``
  (variants of the same model: ``name``, ``url`` or null, ``this``, ``scheme``, ``size``, ``bits``, ``sqnr``, ``kl``,
  ``psnr``, ``needs``: a text), ``kl`` and ``psnr`` (a row has one), ``picture`` (file name, or null), ``others`` (other
  models of the release: ``model``, ``variants``: ``name``, ``url``);
- ``hardware`` (a text), ``needs`` (pairs of package and range), ``verify`` (a command),
  ``limits``: ``title``, ``text``;
- ``files`` (``path``, ``size``, ``sha256``), ``copied`` (a number), ``apart`` (``what``, ``name``,
  ``count``, ``reason``: what did not go the usual way), ``apart_folded``, ``command`` (or null), ``date``, ``versions``
  (name, version), ``device_name``, ``on_gpu`` (it is a GPU), ``elsewhere`` (how many weights another device quantized),
  ``tool`` (name and version).

Filters: ``code`` (as code), ``block("python")`` (a fenced block), ``link(url)``, ``size``, ``number``, ``percent``,
``plural``, ``article`` (a class name after its article), and Jinja's own.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from aoconvert import humanize
from aoconvert.cards import markdown
from aoconvert.errors import UsageError

_NAME = "<card template>"
_OWN = Path(__file__).parent / "template.md.jinja"
HINT = "aoconvert card --help names the variables; aoconvert/cards/template.md.jinja is an example"


def render(template: Path | None, values: dict[str, Any]) -> str:
    """The body of the card.

    Args:
        template: ``None`` for aoconvert's own.
        values: the variables, see above.

    Raises:
        UsageError: the template cannot be read, or fails; with its line.
    """
    from jinja2 import StrictUndefined, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    shown = str(template) if template is not None else _OWN.name
    try:
        source = (template or _OWN).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"the card template {shown} cannot be read: {why}") from error
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, finalize=_escape, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters.update(
        code=markdown.code,
        block=markdown.block,
        link=markdown.link,
        size=humanize.size,
        number=humanize.number,
        percent=humanize.percent,
        plural=humanize.plural,
        article=humanize.with_article,
    )
    try:
        compiled = environment.compile(source, filename=_NAME)
        return environment.template_class.from_code(environment, compiled, environment.make_globals(None)).render(
            values
        )
    except TemplateSyntaxError as error:
        raise UsageError(f"the card template {shown}, line {error.lineno}: {error.message}", hint=HINT) from error
    except Exception as error:  # a template may do anything that Python can refuse
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _NAME]
        where = f", line {lines[-1]}" if lines else ""
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"the card template {shown}{where}: {what}", hint=HINT) from error


def _escape(value: Any) -> Any:
    return markdown.text(value) if isinstance(value, str) else value
