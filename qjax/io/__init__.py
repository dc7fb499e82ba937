"""File bytes and file names: containers and codecs. Nothing below this floor knows of either."""
