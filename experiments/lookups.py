"""How long does looking up tokens in a quantized table take on this GPU, beside its bytes?

A table [128256, 4096] as `quantize` and as `prepare` leave it, read through `qjax.quantized`; all
kernels of a call (CUPTI, medians), on tokens that no call had before. *read* is the fastest reader
of as many bytes: codes and scales of the tokens' rows, and what is written in bfloat16.

    python experiments/lookups.py

"""

import json
import pathlib
import statistics

import ceilings
import jax
import jax.numpy as jnp

import qjax

FORMATS = ("int8", "int4_g128", "nf4_g64", "fp8_e4m3")
TABLE = (128256, 4096)
TOKENS = (1, 1024)


def microseconds(table: qjax.QTensor, tokens: int) -> tuple[float, list[str]]:
    """Of a call, and its kernels."""
    call = qjax.quantized(lambda w, ids: jnp.take(w, ids, axis=0).astype(jnp.bfloat16))
    each = jax.random.randint(jax.random.key(3), (16, tokens), 0, TABLE[0], jnp.int32)
    program = ceilings.compiled(call, table, each[0])
    ceilings.timed(program, table, each[0], runs=1)
    calls = [ceilings.timed(program, table, ids, runs=1)[0] for ids in each]
    us = statistics.median(sum(us for _, us in call) for call in calls)
    return us, sorted({name for name, _ in calls[0]})


def main() -> None:
    """Prints a row per format, table and number of tokens, and writes them to results/."""
    card, rows = jax.devices()[0].device_kind, []
    print(card, "jax", jax.__version__, flush=True)
    for fmt in FORMATS:
        w = jax.random.normal(jax.random.key(0), TABLE, jnp.bfloat16)
        plain = qjax.quantize(w, fmt, 1)
        tables = {"quantized": plain, "prepared": qjax.prepare(plain, unsupported="raise")}
        for (name, table), tokens in ((t, n) for t in tables.items() for n in TOKENS):
            per_row = sum(v.nbytes for v in jax.tree.leaves(plain)) / TABLE[0] + 2 * TABLE[1]
            us, kernels = microseconds(table, tokens)
            read = ceilings.best_reader(int(tokens * per_row))[0]
            row = {"format": fmt, "table": name, "tokens": tokens, "us": us, "read_us": read}
            print(row, kernels, flush=True)
            rows.append(row | {"kernels": kernels})
    path = pathlib.Path(__file__).parent / "results" / f"lookups_{card.replace(' ', '_')}.json"
    head = {"card": card, "jax": jax.__version__, "command": "python experiments/lookups.py"}
    path.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
