"""The catalogue: one entry a scheme. To add a scheme, add an entry here and a row to ``tests/schemes``.

Everything that depends on the settings (granularity, group size, stored bits) is not here:
:mod:`aoconvert.schemes.resolve` reads it off a weight that torchao quantized. Imports no torch.
"""

from __future__ import annotations

from aoconvert.schemes.table.entry import Family, Missing, Preset, SchemeEntry
from aoconvert.schemes.table.families import FAMILIES, PRESETS
from aoconvert.schemes.table.floats import FLOAT8, FLOAT8_DYNAMIC, MICROSCALING
from aoconvert.schemes.table.integers import INT4, INT8, INTX
from aoconvert.schemes.table.missing import MISSING

__all__ = ["FAMILIES", "INT4", "MISSING", "PRESETS", "Family", "Missing", "Preset", "SchemeEntry", "catalogue"]

_CATALOGUE = (*INT8, INT4["cpu"], *FLOAT8, *FLOAT8_DYNAMIC, *MICROSCALING, *INTX)


def catalogue() -> tuple[SchemeEntry, ...]:
    """Every scheme of this version, most used first; ``int4wo`` in the layout that it has when none is asked for."""
    return _CATALOGUE
