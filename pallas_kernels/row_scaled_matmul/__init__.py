"""Products of FP8 operands with one scale per row of each."""
