"""Files: containers (gguf, safetensors) and the codecs that turn their bytes into QTensors."""
