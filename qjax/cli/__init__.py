"""The commands of `python -m qjax`: thin glue between arguments, library and terminal."""
