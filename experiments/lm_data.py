"""The tokens that train_lm.py and qat.py train on: public-domain text, in a BPE learned from it."""

import pathlib
from typing import NamedTuple

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "data"
TRAINING = ("shakespeare.txt", "moby_dick_calibration.txt", "moby_dick_rest.txt")
HELD_OUT = "moby_dick_evaluation.txt"  # chapters that no training file has
VOCAB = 1024  # few merges: 2.1 MB of text shall give as many tokens as it can


class Tokens(NamedTuple):
    """Token ids of the two texts, int32 [n]."""

    training: np.ndarray
    held_out: np.ndarray


def load(cache: pathlib.Path) -> Tokens:
    """The tokens from `cache` (an .npz), which is made where it does not exist, with the tokenizer
    beside it as tokenizer.json.
    """
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        bpe = tokenizer()
        bpe.save(str(cache.with_name("tokenizer.json")))
        ids = lambda names: [i for n in names for i in bpe.encode((FOLDER / n).read_text()).ids]
        arrays = {"training": ids(TRAINING), "held_out": ids([HELD_OUT])}
        np.savez_compressed(cache, **{k: np.array(v, np.int32) for k, v in arrays.items()})
    with np.load(cache) as file:
        return Tokens(file["training"], file["held_out"])


def tokenizer():
    """A byte-level BPE of the training text: every text has tokens, and none is special."""
    import tokenizers  # not needed where the cache was made elsewhere

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train([str(FOLDER / name) for name in TRAINING], trainer)
    return bpe
