"""A weight by optimum-quanto, as its files describe it → the class of today that holds the same codes and scales.

Quanto itself is not needed. Measured on files by optimum-quanto 0.2.7 (``tests/fixtures/legacy/quanto``).
"""
