"""Algorithms that choose codes: each one file, a factory of pure functions."""

from collections.abc import Callable

from qjax.algorithms.base import Algorithm as Algorithm
from qjax.algorithms.base import Stats as Stats
from qjax.algorithms.gptq import gptq as _gptq  # its plain name is that of its module
from qjax.algorithms.rtn import rtn as _rtn

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "rtn": _rtn,
    "gptq": _gptq,
}
