"""qjax: functional quantization for JAX."""
