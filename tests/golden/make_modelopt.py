"""Writes tests/golden/modelopt.npz and hf_quantized/nvfp4, made by NVIDIA's ModelOpt.

Run once, in an environment of its own (torch 2.13.0+cpu, transformers 5.24.0, nvidia-modelopt
0.47.0)::

    python tests/golden/make_modelopt.py

`<algorithm>__<part>` are the tensors that it exports of one matrix, `<algorithm>__values` what its
quantizer makes of the weight while a model runs, before the export; of 4-bit floats and MX, for
which that needs a GPU, what its tensors dequantize to. Rows of the first 16 outputs, where outputs
do not share a scale. The folder is `hf/llama`; `logits.npz` is what transformers
computes in float32 of those values.
"""

import pathlib
import shutil
import tempfile
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import safetensors.torch
import torch
import transformers
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor

HERE = pathlib.Path(__file__).parent
TOKENS = torch.arange(16)[None]
CONFIGS = {
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8_per_channel_per_token": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "fp8_pb_wo": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
    "mxfp8": mtq.MXFP8_DEFAULT_CFG,
    "mxfp4": mtq.MXFP4_DEFAULT_CFG,
    "w8a16": mtq.INT8_WEIGHT_ONLY_CFG,
    "w8a8_sq_per_channel": mtq.INT8_SMOOTHQUANT_CFG,
    "w4a16_awq": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,  # of AWQ the export changes the values
}
QTENSORS = {"nvfp4": NVFP4QTensor, "mxfp8": MXFP8QTensor, "mxfp4": MXFP4QTensor}
MODULE = "model.layers.0.self_attn.k_proj"


def as_numpy(v: torch.Tensor) -> np.ndarray:
    """With the bits of what numpy has no type for."""
    if v.dtype in (torch.float8_e4m3fn, torch.bfloat16):
        bits = v.view(torch.uint8 if v.dtype == torch.float8_e4m3fn else torch.int16).numpy()
        return bits.view(np.uint16) if v.dtype == torch.bfloat16 else bits
    return v.numpy()


def opened(parts: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What exported tensors stand for."""
    kind, double = QTENSORS[name], parts.get("weight_scale_2")
    codes = parts["weight"]
    shape = (codes.shape[0], codes.shape[1] * (1 if name == "mxfp8" else 2))
    q = kind(torch.Size(shape), torch.float32, codes)
    block = {-1: 16 if name == "nvfp4" else 32}
    return q.dequantize(
        torch.float32, scale=parts["weight_scale"], double_scale=double, block_sizes=block
    )


def parts_of(tensors: dict[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    """Those of one matrix."""
    return {
        k.removeprefix(f"{module}."): v
        for k, v in tensors.items()
        if k.startswith(f"{module}.") and "input_scale" not in k
    }


def exported(base: pathlib.Path, name: str, out: pathlib.Path) -> dict[str, Any]:
    """Exports a quantized model; parts of its matrices, with their values, by module."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = mtq.quantize(model, CONFIGS[name], lambda m: m(TOKENS))
    values = {}
    with torch.no_grad():
        for module, layer in model.named_modules():
            if hasattr(layer, "weight_quantizer") and layer.weight_quantizer.is_enabled:
                own = layer.weight_quantizer
                values[module] = None if name in QTENSORS else own(layer.weight).clone()
    export_hf_checkpoint(model, export_dir=out)
    tensors = safetensors.torch.load_file(out / "model.safetensors")
    held = {module: parts_of(tensors, module) for module in values}
    for module, parts in held.items():
        parts["values"] = opened(parts, name) if name in QTENSORS else values[module]
    return held


def main() -> None:
    """Both."""
    held: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder) / "base"
        config = transformers.LlamaConfig(
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
        )
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(base)
        for name in CONFIGS:
            out = pathlib.Path(folder) / name
            parts = exported(base, name, out)[MODULE]
            for part, v in parts.items():
                whole = name == "fp8_pb_wo" or part == "pre_quant_scale" or not v.ndim
                few = 8 if name == "w4a16_awq" and part == "weight" else 16
                held[f"{name}__{part}"] = as_numpy(v if whole else v[:few].contiguous())
    np.savez_compressed(HERE / "modelopt.npz", **held)

    out = HERE / "hf_quantized" / "nvfp4"
    shutil.rmtree(out, ignore_errors=True)
    matrices = exported(HERE / "hf" / "llama", "nvfp4", out)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        HERE / "hf" / "llama", dtype=torch.float32
    )
    with torch.no_grad():
        for module, parts in matrices.items():
            model.get_submodule(module).weight.copy_(parts["values"])
        logits = model(TOKENS).logits.numpy()
    (out / "generation_config.json").unlink()
    np.savez(out / "logits.npz", tokens=TOKENS.numpy(), logits=logits)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(HERE / "hf" / "llama" / file, out / file)


if __name__ == "__main__":
    main()
