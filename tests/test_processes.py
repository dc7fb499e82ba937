"""Two processes of four devices each, joined by jax.distributed: the numbers of one device.

The test starts this file twice; what a process asserts is below `main`.
"""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax

SPECS = ("int4_g16", "nf4_g16_dq", "int8/int8_token")
# weights [in, out]: sharded along the output, along the contraction, along both
LAYOUTS = (P(None, "t"), P("t", None), P("p", "t"))
TIMEOUT = 300


def test_two_processes():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, __file__, address]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(qjax.__file__).parents[1])}
    started = [
        subprocess.Popen(
            [*command, str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
        )
        for i in range(2)
    ]
    try:
        texts = [process.communicate(timeout=TIMEOUT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, texts, strict=True):
        assert process.returncode == 0, text
        assert f"{len(SPECS) * len(LAYOUTS)} layouts agree" in text


def main(address: str, process: int) -> None:
    """What each of the two processes does: the same program on all eight devices."""
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)
    mesh = jax.make_mesh((2, 4), ("p", "t"), axis_types=(AxisType.Auto,) * 2)
    assert [{d.process_index for d in row} for row in mesh.devices] == [{0}, {1}]
    keys = jax.random.split(jax.random.key(0))
    w, x = jax.random.normal(keys[0], (128, 64)), jax.random.normal(keys[1], (8, 128))
    agreed = 0
    for spec in SPECS:
        alone = qjax.quantize(w, spec, 0)
        wanted = jax.jit(qjax.quantized(jnp.matmul))(x, alone)
        for layout in LAYOUTS:
            check(spec, layout, mesh, w, x, alone, wanted)
            agreed += 1
    sys.stdout.write(f"{agreed} layouts agree\n")


def check(spec, layout, mesh, w, x, alone, wanted) -> None:
    """Places, runs and quantizes one weight across the processes."""
    specs = qjax.partition_specs(alone, layout, mesh)
    q = jax.tree.map(lambda v, s: spread(v, mesh, s), alone, specs)
    rows = P("p", None) if "p" not in layout else P()
    got = jax.jit(qjax.quantized(jnp.matmul))(spread(x, mesh, rows), q)
    for piece in got.addressable_shards:
        if spec == "int8/int8_token":  # sums of integers have no order
            np.testing.assert_array_equal(piece.data, wanted[piece.index])
        np.testing.assert_allclose(piece.data, wanted[piece.index], rtol=1e-5, atol=1e-5)

    again = qjax.quantize(spread(w, mesh, layout), spec, 0)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(alone), strict=True):
        for piece in ours.addressable_shards:
            found, needed = np.asarray(piece.data), np.asarray(theirs)[piece.index]
            if spec == "nf4_g16_dq":  # the mean of its scales has no defined order
                np.testing.assert_allclose(
                    found.astype(np.float32), needed.astype(np.float32), rtol=1e-5, atol=1
                )
            else:
                np.testing.assert_array_equal(found, needed)


def spread(value: jax.Array, mesh, spec: P) -> jax.Array:
    """An array over all devices of which every process makes the parts that it holds."""
    host = np.asarray(value)
    where = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
