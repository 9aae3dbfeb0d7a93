"""Proof that a written checkpoint is safe and loads, and what an unknown one is."""
