"""The peer's side of `compare_llm_int8.py`: torch only, run by an interpreter that has the peers.

python experiments/peers_llm_int8.py FOLDER

FOLDER holds config.json and model.safetensors as transformers reads them, and tokens.npy
`[batches, windows, length]`. Writes peer.json there: for each window the mean negative
log-likelihood of the float model and of bitsandbytes', and the mean KL between them.
"""

import json
import pathlib
import sys
import warnings

import bitsandbytes as bnb
import numpy as np
import torch
from bitsandbytes.autograd._functions import MatMul8bitLt
from transformers import AutoModelForCausalLM

THRESHOLD = 6.0


class Int8(torch.nn.Module):
    """A Linear in LLM.int8(). `Linear8bitLt` on a CPU multiplies x as it is, so its own product
    for accelerators is called.
    """

    def __init__(self, linear):
        super().__init__()
        self.layer = bnb.nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            bias=False,
            has_fp16_weights=False,
            threshold=THRESHOLD,
        )
        self.layer.weight = bnb.nn.Int8Params(
            linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False
        )
        self.layer = self.layer.to("cpu")
        self.layer(torch.zeros(1, linear.in_features, dtype=torch.float16))  # fills the state
        self.layer.state.is_training = False

    def forward(self, x):
        """`x [..., in]` times the weight, in float16 as bitsandbytes has it."""
        state = self.layer.state
        rows = x.reshape(-1, x.shape[-1]).to(torch.float16)
        y = MatMul8bitLt.apply(rows, state.CB, None, None, state)
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def nll(logits, tokens):
    """Mean over the tokens of a window but the first: `[windows]`."""
    wanted = tokens[:, 1:, None]
    return -logits.log_softmax(-1)[:, :-1].gather(-1, wanted)[..., 0].mean(-1)


def kl(reference, logits):
    """Mean over the tokens of a window: `[windows]`."""
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean(-1)


def main():
    """Runs both models on all batches."""
    warnings.simplefilter("ignore")
    folder = pathlib.Path(sys.argv[1])
    load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    exact, model, count = load(), load(), 0
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(part, name, Int8(linear))
                    count += 1
    found = {"linears": count, "float": [], "nll": [], "kl": []}
    with torch.no_grad():
        for tokens in torch.from_numpy(np.load(folder / "tokens.npy")).long():
            reference, logits = exact(tokens).logits, model(tokens).logits
            found["float"] += nll(reference, tokens).tolist()
            found["nll"] += nll(logits, tokens).tolist()
            found["kl"] += kl(reference, logits).tolist()
    (folder / "peer.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
