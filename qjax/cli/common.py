"""What every command needs: its result, a console for progress, and loading of models."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from qjax import models

T = TypeVar("T")

# Wide enough that nothing is cut where no terminal says how wide it is.
_WIDTH = 200


class Output(NamedTuple):
    """What a command found: `data` for ``--json``, and how to `show` it to a person."""

    data: dict[str, Any]
    show: Callable[[Console], None]


def output_console() -> Console:
    """The console of results: standard output."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, soft_wrap=False)


def progress_console() -> Console:
    """The console of progress: standard error, so that results can be piped."""
    return Console(stderr=True, highlight=False)


def tracked(items: Sequence[T], description: str) -> Iterable[T]:
    """The items, with a progress bar while they are worked on, if a person is watching."""
    console = progress_console()
    return track(
        items,
        description,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def load_model(path: str) -> tuple[models.Decoder, Any, models.Tokenizer]:
    """Loads a GGUF file, a Hugging Face folder or a folder that ``qjax quantize`` wrote."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file or folder")
    with progress_console().status(f"Loading {printable(path)}"):
        return models.load(path)


def read_text(path: str) -> str:
    """The text of a UTF-8 file; - is standard input."""
    raw = sys.stdin.buffer.read() if path == "-" else pathlib.Path(path).read_bytes()
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None


def printable(text: Any, keep: str = "") -> str:
    r"""`text` with control characters escaped, so that no file can write to the terminal.

    Example:
      >>> printable("a\x1b[2Jb")
      'a\\x1b[2Jb'
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[str] = ()
) -> Table:
    """A plain table; the columns named in `right` hold numbers."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(
            column, justify="right" if column in right else "left", overflow="fold", no_wrap=False
        )
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


def mebibytes(size: int) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:,.2f}"
