"""The peers' side of `compare_ptq.py`: torch only, run by an interpreter that has the peers.

python experiments/peers_ptq.py PROBLEM.npz RESULT.npz
"""

import sys
import time
import warnings

import numpy as np
import torch

GROUP, DAMPING = 128, 0.01


def llm_compressor(problem, order):
    """`quantize_weight` of llm-compressor with the scales given: the rounded weight `[in, out]`."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args = QuantizationArgs(
        num_bits=4, symmetric=True, strategy="group", group_size=GROUP, actorder=order
    )
    scale = torch.from_numpy(problem["scale"].T.copy())[None]
    start = time.perf_counter()
    q, _, fell_back = quantize_weight(
        torch.from_numpy(problem["w"].T.copy())[None],
        torch.from_numpy(problem["hessian"].copy())[None],
        scale,
        torch.zeros_like(scale, dtype=torch.int8),
        None,
        args,
        percdamp=DAMPING,
    )
    assert not fell_back.any()
    return q[0].T.numpy(), time.perf_counter() - start


def gptqmodel(problem, act_order):
    """GPTQModel's `GPTQ` on a Linear: the rounded weight `[in, out]`."""
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    w = problem["w"]
    linear = torch.nn.Linear(*w.shape, bias=False)
    linear.weight.data = torch.from_numpy(w.T.copy())
    config = QuantizeConfig(
        bits=4,
        group_size=GROUP,
        sym=True,
        desc_act=act_order,
        act_group_aware=False,
        static_groups=True,
        damp_percent=DAMPING,
    )
    solver = GPTQ(linear, config)
    solver.quantizer.configure(perchannel=True)
    solver.add_batch(torch.from_numpy(problem["x"])[None], torch.zeros(1))
    start = time.perf_counter()
    found = solver.quantize()
    return found[0].detach().numpy().T, time.perf_counter() - start


def hqq(problem, bits):
    """Hqq's default solver, groups of 64 along in: the rounded weight `[in, out]`."""
    from hqq.core.quantize import Quantizer

    w = torch.from_numpy(problem["w"].T.copy())
    start = time.perf_counter()
    q, meta = Quantizer.quantize(
        w,
        nbits=bits,
        group_size=64,
        axis=1,
        bitpack=False,
        device="cpu",
        compute_dtype=torch.float32,
    )
    seconds = time.perf_counter() - start
    values = (q.float() - meta["zero"].float()) * meta["scale"].float()
    return values.reshape(w.shape).T.numpy(), seconds


def awq(problem):
    """The scale search of llm-compressor's AWQ on one Linear, uint4 groups: its own objective,
    ||x (w - q)||^2 of round to nearest and of the best scales.
    """
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
        disable_quantization,
        initialize_module_for_quantization,
    )
    from llmcompressor.modifiers.transform.awq import base

    x, w = torch.from_numpy(problem["few loud"]), torch.from_numpy(problem["w"].T.copy())
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight.data = w.clone()
    linear.requires_grad_(False)
    args = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=GROUP)
    initialize_module_for_quantization(linear, QuantizationScheme(targets=["Linear"], weights=args))
    disable_quantization(linear)  # as it is while a model is calibrated
    modifier = base.AWQModifier(mappings=[])
    modifier._smooth_activation_stats["x"] = [x.abs().sum(0), torch.tensor(len(x))]
    cache = base.IntermediatesCache(None, None)
    cache.append({"input": x})
    modifier._parent_args_cache[linear] = cache
    mapping = base.ResolvedMapping(
        smooth_name="x",
        smooth_layer=linear,
        balance_layers=[linear],
        balance_names=["w"],
        parent=linear,
        parent_name="w",
    )
    start = time.perf_counter()
    modifier._compute_best_scale(mapping, [x @ w.T], {linear: w})
    seconds = time.perf_counter() - start
    found, count = modifier._error_metrics[0], len(x) * w.shape[0]
    return np.array([found["initial_error"], found["best_error"]]) * count, seconds


def bitsandbytes(problem):
    """LLM.int8() of bitsandbytes on the CPU, threshold 6: the product."""
    import bitsandbytes as bnb
    from bitsandbytes.autograd._functions import MatMul8bitLt

    w = problem["w"]
    layer = bnb.nn.Linear8bitLt(*w.shape, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(
        torch.from_numpy(w.T.copy()), requires_grad=False, has_fp16_weights=False
    )
    layer = layer.to("cpu")
    x = torch.from_numpy(problem["outliers"]).to(torch.float16)
    start = time.perf_counter()
    with torch.no_grad():
        layer(x)  # on a CPU this multiplies x as it is: not LLM.int8(), but it fills the state
        layer.state.is_training = False
        y = MatMul8bitLt.apply(x, layer.state.CB, None, None, layer.state)
    return y.float().numpy(), time.perf_counter() - start


JOBS = {
    "llm-compressor": lambda p: llm_compressor(p, None),
    "llm-compressor, act-order": lambda p: llm_compressor(p, "weight"),
    "gptqmodel": lambda p: gptqmodel(p, False),
    "gptqmodel, act-order": lambda p: gptqmodel(p, True),
    "hqq4": lambda p: hqq(p, 4),
    "hqq3": lambda p: hqq(p, 3),
    "hqq2": lambda p: hqq(p, 2),
    "awq": awq,
    "bitsandbytes": bitsandbytes,
}


def main() -> None:
    """Runs every peer, twice, so that the second time is warm."""
    warnings.simplefilter("ignore")
    problem, results = dict(np.load(sys.argv[1])), {}
    for name, job in JOBS.items():
        try:
            job(problem)
            results[name], results[f"{name} seconds"] = job(problem)
        except Exception as error:  # noqa: BLE001  a peer that does not run here is reported
            results[f"{name} error"] = f"{type(error).__name__}: {error}"[:300]
    np.savez(sys.argv[2], **results)


if __name__ == "__main__":
    main()
