"""Real models: one Flax decoder, its tokenizers, generation, and loading of checkpoints."""

from qjax.models.architecture import Config as Config
from qjax.models.architecture import Rope as Rope
from qjax.models.cache import Cache as Cache
from qjax.models.cache import init_cache as init_cache
from qjax.models.decoder import Decoder as Decoder
from qjax.models.folding import Folded as Folded
from qjax.models.folding import fold as fold
from qjax.models.generate import Generation as Generation
from qjax.models.generate import generator as generator
from qjax.models.loading import load as load
from qjax.models.saved_gguf import save_gguf as save_gguf
from qjax.models.saved_hf import save_hf as save_hf
from qjax.models.tokenizer import Tokenizer as Tokenizer
