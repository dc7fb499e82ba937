"""What every op shares: where it runs, and what an implementation is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Device(NamedTuple):
    """Where a problem is to run: `platform` is "cpu", "gpu" or "tpu", `kind` as jax names it."""

    platform: str
    kind: str

    @classmethod
    def default(cls) -> "Device":
        """The device on which an uncommitted computation runs."""
        chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
        device = jax.devices(chosen)[0] if chosen is None or isinstance(chosen, str) else chosen
        return cls(device.platform, device.device_kind)


class Implementation(NamedTuple):
    """A way to run an op.

    Attributes:
      run: (operands of the op, problem) -> result. Pure and traceable; sees the part of one device.
      supports: (problem, device) -> None, or the reason why not.
      epilogue: whether `run` adds the bias and applies the activation of a problem; where it does
        not, the op does.
      run_joined: (x, [arrays of each weight], [problem of each]) -> [result of each], one launch
        for weights that share x; None where each has its own.
      joins: [problem of each] -> None, or the reason why `run_joined` does not take them.
    """

    run: Callable[..., Any]
    supports: Callable[[Any, Device], str | None]
    epilogue: bool = False
    run_joined: Callable[..., Any] | None = None
    joins: Callable[[Any], str | None] = lambda problems: "it has no joined launch"
