"""Products of int8 rows and an int8 weight, and of a few columns of those rows in bfloat16."""
