"""Every test and doctest runs JAX in its strictest mode, on eight virtual CPU devices.

This file stands at the root so that the doctests of qjax/ run under it too.
"""

import gc
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Most of the suite's time is compiling. This shortens LLVM's part of it, XLA's own is as for users.
# $XLA_FLAGS may say otherwise; it is read when JAX first needs a device.
LESS = "--xla_backend_optimization_level=1"
os.environ["XLA_FLAGS"] = f"{LESS} {os.environ.get('XLA_FLAGS', '')}".strip()

# Each program that JAX holds maps some regions; Linux allows 65,530, and JAX dies at the next one.
MAPPED = 40_000

collect_ignore_glob = ["tests/golden/*.py"]  # how the golden files were made, with their makers

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

# Many tests compile the same programs: if no cache is asked for, one lasts as long as the run, and
# what it starts (xdist's workers, a test's own processes) finds it in the environment.
if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
    CACHE = tempfile.TemporaryDirectory(prefix="qjax-tests-")  # removed when the process ends
    for name, value in {
        "jax_compilation_cache_dir": CACHE.name,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--leaks`: every test under the check of the fixture `no_tracer_leaks`."""
    parser.addoption("--leaks", action="store_true", help="check for leaked tracers everywhere")


@pytest.fixture(autouse=True)
def _leaks(request: pytest.FixtureRequest) -> None:
    """Runs the test under the leak check where the command line asks for it."""
    if request.config.getoption("leaks"):
        if request.node.get_closest_marker("leaks_in_jax"):
            pytest.skip("JAX's own tracers outlive their trace here")
        request.getfixturevalue("no_tracer_leaks")


@pytest.fixture(scope="session", autouse=True)
def _docstring_names(doctest_namespace: dict[str, Any]) -> None:
    """What every docstring example may use without importing it."""
    import qjax

    doctest_namespace.update(jax=jax, jnp=jnp, np=np, qjax=qjax)


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """Keeps what the files before have left alive from the garbage collector.

    It would walk through all of it again and again, and the check for leaks after every trace. That
    check still fails on a leak, but may not name who holds the tracer.
    """
    if _mapped() > MAPPED:
        jax.clear_caches()
    gc.collect()
    gc.freeze()


def _mapped() -> int:
    """How many regions of memory this process maps; 0 where the system does not say."""
    maps = pathlib.Path("/proc/self/maps")
    return len(maps.read_bytes().splitlines()) if maps.exists() else 0


@pytest.fixture
def no_tracer_leaks() -> Iterator[None]:
    """Fails the test if a tracer outlives its trace.

    Opt-in, because the check disables JAX's tracing caches.
    """
    with jax.checking_leaks():
        yield


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """JAX's default promotion, for a test that runs other people's code.

    optax's Adam and many models mix int32 and float32 or broadcast over ranks.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
