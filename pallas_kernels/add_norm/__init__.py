"""A sum, and its RMSNorm."""
