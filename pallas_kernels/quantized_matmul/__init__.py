"""Products of floats and a quantized `[k, n]` weight that lies in a kernel's order."""
