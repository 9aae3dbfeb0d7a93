"""A tensor of old torchao, as its file describes it → the tensor class of today that holds the same codes and scales.

Measured on files by torchao 0.4 to 0.17 (``tests/fixtures/legacy``): the dequantized values equal those of the release
that wrote the file, bit for bit, unless the ``Outcome`` says otherwise. Classes are found by the last component of
their names. Dequantizing is torchao's own arithmetic.
"""
