"""Releases: a model in several schemes, quantized, verified, evaluated, judged and published."""

from aoconvert.releasing.record import Record
from aoconvert.releasing.release import release

__all__ = ["Record", "release"]
