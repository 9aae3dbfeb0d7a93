"""How much a checkpoint lost: the original and the result run on the same inputs, one after the other."""
