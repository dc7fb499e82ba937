<<<<<<< HEAD
"""File bytes and file names: containers and codecs. Nothing below this floor knows of either."""
=======
"""Files: containers (gguf, safetensors) and the codecs that turn their bytes into QTensors."""
>>>>>>> models
