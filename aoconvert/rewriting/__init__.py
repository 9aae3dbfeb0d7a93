"""Moves an int4 checkpoint from one packed layout to another: the same codes, scales and zero points."""

from aoconvert.rewriting.repack import Repacked, repack

__all__ = ["Repacked", "repack"]
