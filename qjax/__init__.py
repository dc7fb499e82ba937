"""qjax: functional quantization for JAX."""

from qjax.qtensor import QTensor as QTensor
from qjax.qtensor import dequantize as dequantize
from qjax.qtensor import is_qtensor as is_qtensor
from qjax.quantizing import quantize as quantize
from qjax.spec import Spec as Spec
from qjax.run import explain as explain
from qjax.run import quantized as quantized
