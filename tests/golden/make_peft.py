"""Makes tests/golden/peft: LoRA adapters that PEFT wrote, and the logits of the adapted model.

python make_peft.py          # torch 2.14.1, transformers 5.24.0, peft 0.21.2
python make_peft.py FOLDER   # logits of hf/llama with the adapters in FOLDER, as npy
"""

import pathlib
import sys

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
TOKENS = torch.tensor([[1, 5, 9, 2, 7, 3, 11, 4]])


def main() -> None:
    """Writes the folder, or prints."""
    model = AutoModelForCausalLM.from_pretrained(HERE / "hf" / "llama", dtype=torch.float32)
    if len(sys.argv) > 1:
        adapted = PeftModel.from_pretrained(model, sys.argv[1])
        with torch.no_grad():
            np.save(pathlib.Path(sys.argv[1]) / "logits.npy", adapted(TOKENS).logits.numpy()[0])
        return
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    adapted.save_pretrained(HERE / "peft")
    (HERE / "peft" / "README.md").unlink(missing_ok=True)
    config = HERE / "peft" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(HERE / "hf" / "llama"), "llama"))
    with torch.no_grad():
        np.save(HERE / "peft" / "logits.npy", adapted(TOKENS).logits.numpy()[0])


if __name__ == "__main__":
    main()
