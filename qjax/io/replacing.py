"""Files and folders that a reader sees whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def replacing(target: pathlib.Path) -> Iterator[BinaryIO]:
    """A temporary file in the folder of `target`, which it becomes at the end, synced.

    Where the block raises, nothing is left of it, and `target` is what it was.

    Example:
      >>> import tempfile
      >>> target = pathlib.Path(tempfile.mkdtemp()) / "numbers"
      >>> with replacing(target) as file:
      ...     _ = file.write(b"123")
      >>> target.read_bytes()
      b'123'
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder beside `target`, which it becomes at the end.

    Where the block raises, nothing is left of it.

    Raises:
      ValueError: there is something at `target`, or no folder for it.

    Example:
      >>> import tempfile
      >>> target = pathlib.Path(tempfile.mkdtemp()) / "model"
      >>> with new_folder(target) as folder:
      ...     _ = (folder / "config.json").write_text("{}")
      >>> [file.name for file in target.iterdir()]
      ['config.json']
    """
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target}: exists; choose another path")
    if not target.parent.is_dir():
        raise ValueError(f"{target}: there is no folder {target.parent}")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
