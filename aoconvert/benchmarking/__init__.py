"""Benchmarks: what a checkpoint, and its original, cost to run. ``children/`` runs in fresh interpreters."""
