"""Statistics on disk: every bit back, what is shared stays shared, folders that lie are refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import qjax
from qjax.io import folder
from qjax.io.stats import load_stats, save_stats


def stats():
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    one = qjax.Stats(hessian=make(4, 4), mean_abs=make(4), count=jnp.float32(7))
    experts = qjax.Stats(
        max_abs=make(3, 6), second_moment=make(3, 6), samples=make(3, 512, 6), count=make(3)
    )
    return {"layer/q": one, "layer/k": one, "experts/down": experts}


def test_every_field_comes_back_bit_for_bit_and_what_is_shared_is_one(tmp_path):
    given = stats()
    save_stats(tmp_path / "s", given)
    found = load_stats(tmp_path / "s")
    assert found.keys() == given.keys()
    assert found["layer/q"] is found["layer/k"]
    for path, one in given.items():
        for field in ("hessian", "mean_abs", "max_abs", "second_moment", "samples", "count"):
            before, after = getattr(one, field), getattr(found[path], field)
            assert (before is None) == (after is None)
            if before is not None:
                np.testing.assert_array_equal(before, after)
    # another reader sees each array once
    (shard,) = (tmp_path / "s").glob("*.safetensors")
    assert len(load_file(shard)) == 3 + 4


def test_what_was_loaded_quantizes_like_what_was_saved(tmp_path):
    params = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(16, 4)), jnp.float32)}
    fn, x = (
        (lambda p, x: x @ p["w"]),
        jnp.asarray(np.random.default_rng(2).normal(size=(9, 16)), "f4"),
    )
    recipe, sites = (
        qjax.Recipe(qjax.Rule(".*", "int4", qjax.gptq())),
        qjax.find_sites(fn, params, x),
    )
    collected = qjax.calibrate(fn, params, [x], recipe)
    save_stats(tmp_path / "s", collected)
    one, two = (
        qjax.quantize_params(params, recipe, sites, stats=s)["w"]
        for s in (collected, load_stats(tmp_path / "s"))
    )
    np.testing.assert_array_equal(one.qvalue, two.qvalue)


def test_what_is_no_stats_is_not_written(tmp_path):
    good = stats()["layer/q"]
    for message, changed in (
        ("no count", qjax.Stats(hessian=good.hessian)),
        ("must be a float32 array", qjax.Stats(mean_abs=jnp.ones(4, jnp.int32), count=good.count)),
        ("is not square", qjax.Stats(hessian=jnp.ones((3, 4)), count=good.count)),
        ("does not fit", qjax.Stats(mean_abs=jnp.ones(3), max_abs=jnp.ones(4), count=good.count)),
        ("does not fit", qjax.Stats(mean_abs=jnp.ones((2, 3)), count=good.count)),
    ):
        with pytest.raises(ValueError, match=message):
            save_stats(tmp_path / "s", {"w": changed})
    assert not (tmp_path / "s").exists()
    save_stats(tmp_path / "s", {"w": good})
    with pytest.raises(ValueError, match="exists"):
        save_stats(tmp_path / "s", {"w": good})


def edited(change):
    def edit(path):
        fields = json.loads((path / folder.MANIFEST).read_text())
        change(fields)
        (path / folder.MANIFEST).write_text(json.dumps(fields))

    return edit


BROKEN = {
    "kind must be 'stats'": edited(lambda f: f["metadata"].pop("kind")),
    "paths, an object": edited(lambda f: f["metadata"].update(paths=[])),
    "nothing else": edited(lambda f: f["metadata"].update(more=1)),
    "is no Stats of the folder": edited(lambda f: f["metadata"]["paths"].update(w=9)),
    "belongs to no path": edited(lambda f: f["metadata"]["paths"].pop("experts/down")),
    "Stats have hessian": edited(lambda f: f["parameters"][0]["path"].__setitem__(1, "odd")),
    "must be a dictionary of arrays": edited(lambda f: f["parameters"][0].update(path=[5])),
    "is missing": lambda path: (path / folder.MANIFEST).unlink(),
    "safetensors": lambda path: next(path.glob("*.safetensors")).write_bytes(b"short"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_folders_raise_value_errors(tmp_path, message):
    save_stats(tmp_path / "s", stats())
    BROKEN[message](tmp_path / "s")
    with pytest.raises(ValueError, match=message):
        load_stats(tmp_path / "s")


def test_parameters_are_no_stats(tmp_path):
    folder.write_folder(tmp_path / "p", {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="save_stats did not write this folder"):
        load_stats(tmp_path / "p")
