"""Products of FP8 operands with one scale per 128 of the contraction."""
