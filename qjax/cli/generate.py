"""``qjax generate``: continues a prompt."""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np
from rich.console import Console

from qjax.cli.common import Output, load_model, printable, progress_console
from qjax.models import generator
from qjax.prepared import prepare
from qjax.run import quantized


def run(args: argparse.Namespace) -> Output:
    """Continues `args.prompt`."""
    model, params, tokenizer = load_model(args.model)
    prompt = tokenizer.encode(args.prompt)
    if not prompt:
        raise ValueError(
            "--prompt is empty, and this model begins no text by itself; give some text"
        )
    params = prepare(params)
    generate = generator(
        quantized(model.apply),
        model.config,
        max_new_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop_ids=tokenizer.stop_ids,
    )
    start = time.perf_counter()
    with progress_console().status("Compiling and generating"):
        found = generate(params, np.asarray([prompt], np.int32), jax.random.key(args.seed))
        tokens = np.asarray(found.tokens)[0, : int(found.lengths[0])].tolist()
    seconds = time.perf_counter() - start
    stopped = tokens[-1] in tokenizer.stop_ids
    text = tokenizer.decode(tokens[:-1] if stopped else tokens)
    data = {
        "model": args.model,
        "prompt": args.prompt,
        "text": text,
        "prompt_tokens": len(prompt),
        "tokens": tokens,
        "stopped": stopped,
        "seconds": seconds,
    }

    def show(console: Console) -> None:
        console.print(printable(args.prompt + text, keep="\n\t"), markup=False, soft_wrap=True)

    return Output(data, show)
