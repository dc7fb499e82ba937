"""Writes tests/golden/hf: tiny random models saved by `transformers`, with the logits it computes.

Run once, in an environment of its own (torch 2.13.0+cpu, transformers 5.24.0)::

    python tests/golden/make_hf.py

The weights are random everywhere, norms and biases included, so that a wrong name, a missing +1 or
a transposed matrix shows. llama is float32 and qwen2 bfloat16, both in shards; qwen3, qwen3_moe and
mixtral are float16. Two experts of four answer each token; qwen3_moe does not scale their weights
to sum to 1, mixtral does and has a sliding window.

Names on the command line write those families only.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

OUT = pathlib.Path(__file__).parent / "hf"
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 20))
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "llama": (
        transformers.LlamaConfig(
            **SIZES, num_hidden_layers=2, rope_parameters=LLAMA3, tie_word_embeddings=False
        ),
        torch.float32,
        "60KB",
    ),
    "qwen2": (
        transformers.Qwen2Config(**SIZES, num_hidden_layers=2, tie_word_embeddings=False),
        torch.bfloat16,
        "30KB",
    ),
    "qwen3": (
        transformers.Qwen3Config(
            **SIZES, num_hidden_layers=2, head_dim=16, tie_word_embeddings=True
        ),
        torch.float16,
        "1GB",
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig(
            **SIZES,
            num_hidden_layers=2,
            head_dim=16,
            moe_intermediate_size=24,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=False,
        ),
        torch.float16,
        "1GB",
    ),
    "mixtral": (
        transformers.MixtralConfig(
            **SIZES,
            num_hidden_layers=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=7,
        ),
        torch.float16,
        "1GB",
    ),
    "gemma3": (
        transformers.Gemma3TextConfig(
            **SIZES,
            num_hidden_layers=3,
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        torch.float32,
        "1GB",
    ),
}
TEXT = ["the cat sat on the mat; the dog ate the cat's hat.", "then the rat ran at 12345 mph"]


def make_tokenizer(folder):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=96, special_tokens=["<bos>", "<eos>"])
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>"
    )
    fast.save_pretrained(folder)


def main():
    for name in sys.argv[1:] or MODELS:
        config, dtype, shard = MODELS[name]
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for key, value in model.named_parameters():
                noise = torch.randn_like(value)
                if key.endswith("norm.weight"):
                    value.copy_(0.2 * noise + (0.0 if name == "gemma3" else 1.0))
                else:
                    value.copy_(noise * (value.shape[-1] ** -0.5 if value.ndim > 1 else 0.5))
        model = model.to(dtype)
        folder = OUT / name
        model.save_pretrained(folder, max_shard_size=shard)
        make_tokenizer(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        saved = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            logits = saved.eval()(torch.tensor(TOKENS)).logits
        np.savez(folder / "logits.npz", tokens=TOKENS.astype(np.int32), logits=logits.numpy())


if __name__ == "__main__":
    main()
