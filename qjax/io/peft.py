"""Adapters in the folder layout of Hugging Face's PEFT: what it writes, and what it reads.

`adapter_config.json` says rank and alpha; `adapter_model.safetensors` holds, for a module that
Hugging Face calls NAME, `base_model.model.NAME.lora_A.weight` [rank, in] and
`base_model.model.NAME.lora_B.weight` [out, rank].
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.io import safetensors
from qjax.io.strict_json import read_object
from qjax.training.lora import Adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_REFUSED = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")


def save(
    folder: str | os.PathLike[str],
    adapters: Mapping[str, Adapter],
    name_of: Callable[[str], str],
    base_model: str = "",
) -> None:
    """Writes adapters of plain `[in, out]` weights so that PEFT reads them.

    Args:
      folder: made if it does not exist.
      adapters: by path, all of one rank and alpha.
      name_of: path -> what Hugging Face calls the weight, ".weight" at its end or not, such as
        `qjax.models.names.hf_name` after the leading "params/" is cut off.
      base_model: what the adapters belong to, for the reader's information.

    Raises:
      ValueError: if ranks or alphas differ, or a weight is stacked or has more than two axes.

    Example:
      >>> import tempfile
      >>> a, b = jnp.ones((8, 2)), jnp.ones((2, 4))
      >>> adapters = {"w": qjax.training.Adapter(a, b, 4.0, (-2,))}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(folder, adapters, lambda path: f"model.{path}.weight")
      ...     again = load(folder, ["w"], lambda path: f"model.{path}.weight")
      >>> again["w"].b.shape, again["w"].scaling
      ((2, 4), 2.0)
    """
    kinds = sorted({(v.rank, v.alpha) for v in adapters.values()})
    if len(kinds) != 1:
        raise ValueError(f"a PEFT folder has one rank and alpha, the adapters have {kinds}")
    ((rank, alpha),) = kinds
    tensors: dict[str, np.ndarray] = {}
    modules = {}
    for path, adapter in adapters.items():
        if adapter.a.ndim != 2 or adapter.b.ndim != 2:
            raise ValueError(
                f"{path}: PEFT adapts matrices, this weight has more axes (a {adapter.a.shape}, "
                f"b {adapter.b.shape}); unstack the layers, leave experts out"
            )
        module = name_of(path).removesuffix(".weight")
        modules[module.rsplit(".", 1)[-1]] = None
        a, b = (np.asarray(v, np.float32) for v in (adapter.a, adapter.b))
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b.T)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(modules),
        "inference_mode": True,
    }
    root = pathlib.Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    safetensors.write(root / WEIGHTS, tensors, {"format": "pt"})
    temporary = root / f".{CONFIG}.tmp"  # last and whole, as `load` begins with it
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    temporary.replace(root / CONFIG)


def load(
    folder: str | os.PathLike[str], paths: Any, name_of: Callable[[str], str]
) -> dict[str, Adapter]:
    """Reads the LoRA adapters that PEFT, or `save`, wrote.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      paths: of the parameters that may have one, `[in, out]` each: the sites of a model.
      name_of: as for `save`.

    Returns:
      By path, an Adapter in float32.

    Raises:
      ValueError: naming file and key, if the folder holds something else than plain LoRA, a tensor
        is missing or has the wrong shape, or belongs to none of `paths`.
    """
    root = pathlib.Path(folder)
    where = root / CONFIG
    if not where.exists():
        raise ValueError(f"{where}: is missing; a PEFT folder has one")
    config = read_object(where.read_bytes(), str(where))
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {config.get('peft_type')!r}, only LORA is read")
    for key in _REFUSED:
        if config.get(key):
            raise ValueError(f"{where}: {key} is {config[key]!r}; only plain LoRA is read")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias is {config['bias']!r}, must be 'none'")
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(f"{where}: lora_alpha is {alpha!r}, must be a number")
    tensors, _ = safetensors.read(root / WEIGHTS)
    rest, found = dict(tensors), {}
    for path in paths:
        module = _PREFIX + name_of(path).removesuffix(".weight")
        names = [f"{module}.lora_{x}.weight" for x in "AB"]
        if not any(name in rest for name in names):
            continue
        missing = [name for name in names if name not in rest]
        if missing:
            raise ValueError(f"{root / WEIGHTS}: tensor {missing[0]!r} is missing")
        a, b = (np.asarray(rest.pop(name), np.float32).T for name in names)
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or a.shape[1] != config.get("r"):
            raise ValueError(
                f"{root / WEIGHTS}: {names[0]!r} and its B have shapes {a.T.shape} and "
                f"{b.T.shape}, r is {config.get('r')!r}"
            )
        found[path] = Adapter(jnp.asarray(a), jnp.asarray(b), float(alpha), (-2,))
    if rest:
        raise ValueError(
            f"{root / WEIGHTS}: {sorted(rest)[0]!r} belongs to no parameter of `paths`"
        )
    return found
