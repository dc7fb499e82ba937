"""qjax: functional quantization for JAX."""

import qjax.exporting as _exporting  # noqa: F401  registers QTensors with jax.export
from qjax import training as training
from qjax.algorithms.awq import awq as awq
from qjax.algorithms.base import Algorithm as Algorithm
from qjax.algorithms.base import Stats as Stats
from qjax.algorithms.gptq import gptq as gptq
from qjax.algorithms.hqq import hqq as hqq
from qjax.algorithms.llm_int8 import llm_int8 as llm_int8
from qjax.algorithms.rtn import rtn as rtn
from qjax.algorithms.smoothquant import smoothquant as smoothquant
from qjax.calibration import Args as Args
from qjax.calibration import calibrate as calibrate
from qjax.calibration import merge_stats as merge_stats
from qjax.prepared import Prepared as Prepared
from qjax.prepared import prepare as prepare
from qjax.prepared import unprepare as unprepare
from qjax.qtensor import QTensor as QTensor
from qjax.qtensor import dequantize as dequantize
from qjax.qtensor import is_qtensor as is_qtensor
from qjax.quantizing import quantize as quantize
from qjax.recipe import Recipe as Recipe
from qjax.recipe import Rule as Rule
from qjax.recipe import is_gathered as is_gathered
from qjax.reporting import report as report
from qjax.run import explain as explain
from qjax.run import quantized as quantized
from qjax.sequential import quantize_sequential as quantize_sequential
from qjax.sharding import partition_specs as partition_specs
from qjax.sites import Site as Site
from qjax.sites import find_sites as find_sites
from qjax.spec import Spec as Spec
from qjax.transform import quantize_params as quantize_params
from qjax.trees import combine as combine
from qjax.trees import partition as partition
from qjax.trees import stack as stack
from qjax.trees import unstack as unstack
