"""A file that a reader sees whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
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
