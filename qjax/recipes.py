"""Named recipes: what a person asks for by name.

`named("w4a16_gptq")` is a Recipe. Tables that are looked up, tied heads included, are kept, and so
is what routes tokens to experts. An untied head becomes int8, which loses nothing that one can
measure: SmolLM2 with every projection in int8 costs 0.1 % (`experiments/perplexity.py`).
For mixed precision by path put rules in front:

    Recipe(Rule(".*/down/kernel", "int8"), *named("w4a16_gptq").rules)
"""

from collections.abc import Callable

from qjax.algorithms.awq import awq
from qjax.algorithms.base import Algorithm
from qjax.algorithms.gptq import gptq
from qjax.algorithms.hqq import hqq
from qjax.algorithms.llm_int8 import llm_int8
from qjax.algorithms.smoothquant import smoothquant
from qjax.recipe import Recipe, Rule, is_gathered

ROUTER = r".*([Rr]outer|gate_inp|block_sparse_moe/gate(/|$)).*"
HEAD = r"(.*/)?(head|lm_head|output)(/(kernel|weight))?"


def _whole(spec: str, algorithm: Algorithm | None = None, head: str = "int8") -> Recipe:
    return Recipe(
        Rule(r".*", None, where=is_gathered, optional=True),
        Rule(ROUTER, None, optional=True),
        Rule(HEAD, head, optional=True),
        Rule(r".*", spec, algorithm),
    )


def _k_quants(most: str, more: str, first: str) -> Recipe:
    """llama.cpp's M mixes: v and down get more bits, attention's or the mlp's other weights `most`.

    Tables and heads are in q6_k. llama.cpp gives more bits to half of the layers only, by number;
    rules go by path and give them to all.
    """
    return Recipe(
        Rule(r".*", first, where=is_gathered, optional=True),
        Rule(HEAD, first, optional=True),
        Rule(ROUTER, None, optional=True),
        Rule(r".*/(v|v_proj|attn_v|down|down_proj|ffn_down)(/.*)?", more, optional=True),
        Rule(r".*", most),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "w8a16": lambda: _whole("int8"),
    "w4a16_rtn": lambda: _whole("int4_g128"),
    "w4a16_gptq": lambda: _whole("int4_g128", gptq(scales="updated")),  # docs/calibration.md
    "w4a16_awq": lambda: _whole("int4_g128", awq()),
    "w4a16_awq_gptq": lambda: _whole("int4_g128", awq(solver=gptq)),
    "w3a16_awq_gptq": lambda: _whole("int3_g128", awq(solver=gptq)),
    "w8a8": lambda: _whole("int8/int8_token"),
    "w8a8_smoothquant": lambda: _whole("int8/int8_token", smoothquant()),
    "llm_int8": lambda: _whole("int8/int8_token", llm_int8()),
    "hqq4": lambda: _whole("uint4_g64", hqq()),
    "fp8": lambda: _whole("fp8_e4m3/fp8_e4m3_token", head="fp8_e4m3"),
    "nf4": lambda: _whole("nf4_g64_dq"),
    "q4_k_m": lambda: _k_quants("q4_k", "q6_k", "q6_k"),
    "q5_k_m": lambda: _k_quants("q5_k", "q6_k", "q6_k"),
    "q3_k_m": lambda: _k_quants("q3_k", "q5_k", "q6_k"),
}


def named(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
      ValueError: naming the known ones.

    Example:
      >>> named("w4a16_gptq").rules[-1].spec.format
      'int4'
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe is named {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]()
