"""GPTQ as the paper states it, in numpy and float64: what the tests judge the library by."""

import numpy as np


def gptq(w, hessian, damping, quantize_row, order=None):
    """Algorithm 1 of arXiv:2210.17323, one column after the other, without blocks.

    Args:
      w: float64 `[in, out]`; the paper's W is its transpose.
      hessian: `[in, in]`.
      damping: of the mean of the diagonal.
      quantize_row: (row number, values `[out]`) -> rounded values.
      order: which rows to take, first to last.

    Returns:
      The rounded weight.
    """
    w = w.astype(np.float64).copy()
    order = np.arange(len(w)) if order is None else order
    w = w[order]
    h = hessian.astype(np.float64)[np.ix_(order, order)]
    h += damping * np.mean(np.diag(h)) * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    rounded = np.empty_like(w)
    for k in range(len(w)):
        rounded[k] = quantize_row(order[k], w[k])
        error = (w[k] - rounded[k]) / upper[k, k]
        w[k:] -= np.outer(upper[k, k:], error)
    return rounded[np.argsort(order)]


def output_error(w, rounded, hessian):
    """||X (W - Q)||^2 = trace((W - Q)^T X^T X (W - Q)), in float64."""
    e = np.asarray(w, np.float64) - np.asarray(rounded, np.float64)
    return float(np.sum(e * (np.asarray(hessian, np.float64) @ e)))


def hessian(size, tokens, condition, seed=0):
    """x^T x of inputs whose second moments have a given condition number."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    spectrum = np.geomspace(1, 1 / condition, size)
    x = rng.normal(size=(tokens, size)) * np.sqrt(spectrum) @ basis.T
    return x.T @ x
