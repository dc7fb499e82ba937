"""PEFT's folders of adapters: what it wrote is read, what is written has its names and shapes."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import models, training
from qjax.io import peft, safetensors
from qjax.models.names import hf_name

GOLDEN = pathlib.Path(__file__).parent / "golden"
TOKENS = jnp.array([[1, 5, 9, 2, 7, 3, 11, 4]])

pytestmark = pytest.mark.usefixtures("standard_promotion")


def name_of(path):
    return hf_name(path.removeprefix("params/"), "llama")


@pytest.fixture(scope="module")
def loaded():
    model, params, _ = models.load(GOLDEN / "hf" / "llama")
    return model, params, peft.load(GOLDEN / "peft", sites_of(model, params), name_of)


def sites_of(model, params):
    return qjax.find_sites(model.apply, params, TOKENS)


def test_logits_are_those_of_peft(loaded):
    model, params, adapters = loaded
    assert {a.rank for a in adapters.values()} == {3}
    got = training.lora(model.apply)(params, adapters, TOKENS)[0]
    wanted = np.load(GOLDEN / "peft" / "logits.npy")
    # float32 in another order of sums
    np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(np.asarray(model.apply(params, TOKENS)[0]) - wanted).max() > 0.1


def test_what_is_written_is_what_peft_wrote(loaded, tmp_path):
    _, _, adapters = loaded
    peft.save(tmp_path, adapters, name_of)
    ours, _ = safetensors.read(tmp_path / peft.WEIGHTS)
    theirs, _ = safetensors.read(GOLDEN / "peft" / peft.WEIGHTS)
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    config = json.loads((GOLDEN / "peft" / peft.CONFIG).read_text())
    mine = json.loads((tmp_path / peft.CONFIG).read_text())
    for key in ("peft_type", "r", "lora_alpha", "bias"):
        assert mine[key] == config[key]
    assert sorted(mine["target_modules"]) == sorted(config["target_modules"])


def test_bad_input(loaded, tmp_path):
    model, params, adapters = loaded
    sites = sites_of(model, params)
    with pytest.raises(ValueError, match=r"belongs to no parameter of `paths`"):
        peft.load(GOLDEN / "peft", list(sites)[:2], name_of)
    with pytest.raises(ValueError, match=r"adapter_config.json: is missing"):
        peft.load(tmp_path, sites, name_of)
    (path, adapter), *_ = adapters.items()
    peft.save(tmp_path, {path: adapter}, name_of)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    (tmp_path / peft.CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match=r"use_dora is True; only plain LoRA is read"):
        peft.load(tmp_path, sites, name_of)
    (tmp_path / peft.CONFIG).write_text(json.dumps(config | {"r": 5}))
    with pytest.raises(ValueError, match=r"shapes .* r is 5"):
        peft.load(tmp_path, sites, name_of)
    stacked = training.Adapter(jnp.ones((2, 8, 3)), jnp.ones((2, 3, 8)), 3.0, (-2,))
    with pytest.raises(ValueError, match=r"PEFT adapts matrices.*unstack the layers"):
        peft.save(tmp_path, {path: stacked}, name_of)
    other = training.Adapter(jnp.ones((8, 2)), jnp.ones((2, 8)), 3.0, (-2,))
    with pytest.raises(ValueError, match=r"one rank and alpha"):
        peft.save(tmp_path, {path: adapter, "other": other}, name_of)
