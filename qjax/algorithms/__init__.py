"""Algorithms that choose codes: each one file, a factory of pure functions."""

from collections.abc import Callable

from qjax.algorithms.awq import awq as _awq  # the plain name is that of the module
from qjax.algorithms.base import Algorithm as Algorithm
from qjax.algorithms.base import Stats as Stats
from qjax.algorithms.gptq import gptq as _gptq
from qjax.algorithms.hqq import hqq as _hqq
from qjax.algorithms.llm_int8 import llm_int8 as _llm_int8
from qjax.algorithms.rtn import rtn as _rtn
from qjax.algorithms.smoothquant import smoothquant as _smoothquant

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "rtn": _rtn,
    "gptq": _gptq,
    "awq": _awq,
    "smoothquant": _smoothquant,
    "llm_int8": _llm_int8,
    "hqq": _hqq,
}
