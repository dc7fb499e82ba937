"""Low-precision training: pure transforms of any loss function."""

from qjax.training.learned import Learned as Learned
from qjax.training.lora import Adapter as Adapter
from qjax.training.lora import loftq as loftq
from qjax.training.lora import lora as lora
from qjax.training.lora import lora_init as lora_init
from qjax.training.lora import lora_merge as lora_merge
from qjax.training.low_precision import FP8 as FP8
from qjax.training.low_precision import fp8 as fp8
from qjax.training.optimizers import adamw4bit as adamw4bit
from qjax.training.optimizers import adamw8bit as adamw8bit
from qjax.training.optimizers import lion8bit as lion8bit
from qjax.training.optimizers import round_stochastically as round_stochastically
from qjax.training.recipes import RECIPES as RECIPES
from qjax.training.recipes import Cast as Cast
from qjax.training.recipes import Recipe as Recipe
from qjax.training.state import State as State
from qjax.training.straight_through import FakeQuant as FakeQuant
from qjax.training.straight_through import fake_quant as fake_quant
