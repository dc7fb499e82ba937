"""The trained models that ship as test data: they load, and have learned their language."""

import pathlib

import jax
import numpy as np
import pytest

from qjax import evaluate, models

ROOT = pathlib.Path(__file__).parent
TEXT = ROOT.parent / "experiments" / "data" / "moby_dick_evaluation.txt"


@pytest.mark.parametrize("name", ["trained_dense", "trained_experts"])
def test_it_predicts_chapters_it_never_saw(name):
    """A unigram model fitted to the very windows has at least their entropy as its loss."""
    model, params, tokenizer = models.load(ROOT / "golden" / name)
    windows = evaluate.text_windows(tokenizer, TEXT.read_text(), 128, 16)
    _, counts = np.unique(windows[:, 1:], return_counts=True)
    p = counts / counts.sum()
    found = evaluate.perplexity(model.apply, params, evaluate.batched(windows, 16))
    assert found.nll < -np.sum(p * np.log(p)) - 1
    assert {v.dtype.name for v in jax.tree.leaves(params)} == {"float32"}
