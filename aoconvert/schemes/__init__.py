"""Quantization schemes: from a name to a torchao config, and what it demands of weights, devices and packages.

Nothing here imports torch before it must: :func:`catalogue`, :func:`find` and :func:`availability` never do.
"""

from aoconvert.schemes.base import Layout, Scheme
from aoconvert.schemes.names import availability, find
from aoconvert.schemes.resolve import get
from aoconvert.schemes.shapes import blocker
from aoconvert.schemes.table import SchemeEntry, catalogue

__all__ = ["Layout", "Scheme", "SchemeEntry", "availability", "blocker", "catalogue", "find", "get"]
