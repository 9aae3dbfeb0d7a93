"""Writes a finished checkpoint again: int4 in another packing, old tensors in the classes of today. The same codes."""

from aoconvert.rewriting.migrate import Migrated, migrate
from aoconvert.rewriting.repack import Repacked, repack

__all__ = ["Migrated", "Repacked", "migrate", "repack"]
