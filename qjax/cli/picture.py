"""The picture of a report: the output error of each weight, before and after."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from qjax.solving import Solved

MISSING = "install matplotlib, pip install 'qjax[plot]'"


def draw(path: str, entries: Sequence[Solved]) -> str | None:
    """Draws the entries into a PNG file and returns its path; None where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import (  # pyright: ignore[reportMissingImports]
        FigureCanvasAgg,
    )
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(max(8.0, 0.12 * len(entries)), 5.0), layout="constrained")
    axes = figure.add_subplot(xlabel="weight, in the order of the model", yscale="log")
    axes.set_ylabel("output error, relative to the output's energy")
    places = range(len(entries))
    axes.plot(places, [e.error_before for e in entries], "o", label="round to nearest", ms=4)
    axes.plot(places, [e.error_after for e in entries], "o", label="as quantized", ms=4)
    for i, e in enumerate(entries):
        axes.plot([i, i], [e.error_before, e.error_after], color="0.7", lw=1, zorder=0)
    axes.set_xticks(places, [e.path for e in entries], rotation=90, fontsize=5)
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    FigureCanvasAgg(figure).print_png(path)
    return path
