"""Writes a finished checkpoint again, with the same codes.

int4 in another packing, old tensors in the classes of today, the other file format.
"""

from aoconvert.rewriting.convert import Converted, convert
from aoconvert.rewriting.migrate import Migrated, migrate
from aoconvert.rewriting.repack import Repacked, repack

__all__ = ["Converted", "Migrated", "Repacked", "convert", "migrate", "repack"]
