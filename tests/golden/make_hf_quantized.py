"""Writes tests/golden/hf_quantized: `hf/llama` quantized and saved by compressed-tensors.

Run once, in an environment of its own (torch 2.13.0+cpu, transformers 5.24.0, compressed-tensors
0.20.1)::

    python tests/golden/make_hf_quantized.py

Round to nearest, groups of 16, the head as it is. `logits.npz` holds what transformers computes of
the quantized weights before they are packed: of the asymmetric folder it cannot load its own files.
"""

import pathlib
import shutil

import numpy as np
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams

HERE = pathlib.Path(__file__).parent
TOKENS = torch.arange(16)[None]


def write(name: str, symmetric: bool) -> None:
    """One folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        HERE / "hf" / "llama", dtype=torch.float32
    )
    args = QuantizationArgs(
        num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=16
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], quantization_status="initialized"
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.data.reshape(module.weight.shape[0], -1, 16)
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
            module.weight_scale.data.copy_(scale)
            if not symmetric:
                module.weight_zero_point.data.copy_(zero)
            module.quantization_status = QuantizationStatus.FROZEN
    with torch.no_grad():
        logits = model(TOKENS).logits.numpy()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    out = HERE / "hf_quantized" / name
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    compressor.update_config(out)
    (out / "generation_config.json").unlink()
    np.savez(out / "logits.npz", tokens=TOKENS.numpy(), logits=logits)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(HERE / "hf" / "llama" / file, out / file)


if __name__ == "__main__":
    write("w4a16", symmetric=True)
    write("w4a16_asym", symmetric=False)
