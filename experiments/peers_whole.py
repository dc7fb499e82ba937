"""The peers' whole-model runs of `ptq_cost.py`: torch only, run by an interpreter that has them.

python experiments/peers_whole.py llm-compressor|gptqmodel FOLDER

FOLDER is what `hf_folder.py` writes, and tokens.npy `[windows, length]`. Writes PEER.json there:
the seconds of quantizing (loading the model is not counted), and the largest resident memory above
that before the call, in bytes.
"""

import json
import os
import pathlib
import sys
import threading
import time
import warnings

import numpy as np
import torch

BITS, GROUP, DAMPING = 4, 64, 0.01


def llm_compressor(folder, tokens):
    """Seconds and memory of `oneshot` with a GPTQModifier."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [{"input_ids": t.tolist(), "attention_mask": [1] * len(t)} for t in tokens]
    data = DataLoader(Dataset.from_list(rows).with_format("torch"), batch_size=4)
    weights = {"num_bits": BITS, "symmetric": True, "strategy": "group", "group_size": GROUP}
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        dampening_frac=DAMPING,
    )
    return measured(
        lambda: oneshot(
            model=model,
            processor=words_for(folder),
            dataset=data,
            recipe=recipe,
            num_calibration_samples=len(tokens),
        )
    )


def gptqmodel(folder, tokens):
    """Seconds and memory of `GPTQModel.quantize`."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer it does not load
    from gptqmodel import GPTQModel, QuantizeConfig

    words_for(folder)
    config = QuantizeConfig(
        bits=BITS,
        group_size=GROUP,
        sym=True,
        desc_act=False,
        act_group_aware=False,
        damp_percent=DAMPING,
        device="cpu",
    )
    model = GPTQModel.load(str(folder), config)
    rows = [{"input_ids": t.tolist(), "attention_mask": [1] * len(t)} for t in tokens]
    return measured(lambda: model.quantize(rows, batch_size=4))


def words_for(folder):
    """A tokenizer that both ask for and tokens do not need."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w0"
    )
    made.save_pretrained(folder)
    return made


def measured(call):
    """{"seconds", "memory"} of a call."""
    page, stop, grown = os.sysconf("SC_PAGE_SIZE"), threading.Event(), [0]
    now = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * page
    level, start = now(), time.perf_counter()

    def watch():
        while not stop.wait(0.02):
            grown[0] = max(grown[0], now() - level)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        call()
    finally:
        stop.set()
        thread.join()
    return {"seconds": time.perf_counter() - start, "memory": grown[0]}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    name, place = sys.argv[1], pathlib.Path(sys.argv[2])
    run = {"llm-compressor": llm_compressor, "gptqmodel": gptqmodel}[name]
    found = run(place, np.load(place / "tokens.npy"))
    (place / f"{name}.json").write_text(json.dumps(found))
