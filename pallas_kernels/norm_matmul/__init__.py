"""The RMSNorm of a sum, and products of it with quantized weights."""
