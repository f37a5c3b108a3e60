"""Cells as a picture: the roofline of each card, and where a decode step stands under it, modelled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxdecode.aot.check.cells import Cell, Question

_MARKERS = "osD^vP*X"


def plot_rooflines(questions: Sequence[Question], cells: Sequence[Cell], file: Path) -> None:
    """Writes a PNG with one panel a card: operations a second against operations a byte, on logarithmic axes.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: no cell has a modelled time.
    """
    import matplotlib  # pyright: ignore[reportMissingImports]: of the extra `check`

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    pairs = [(q, c) for q, c in zip(questions, cells, strict=True) if c.modelled is not None]
    if not pairs:
        raise ValueError("there is nothing to plot: no cell fits its card and compiles")
    cards = list(dict.fromkeys(cell.card for _, cell in pairs))
    figure, panels = pyplot.subplots(1, len(cards), figsize=(6.5 * len(cards), 5), squeeze=False)
    for card, axes in zip(cards, panels[0], strict=True):
        mine = [(q, c) for q, c in pairs if c.card == card]
        _roof(axes, mine[0][0])
        for marker, model in zip(_MARKERS * len(mine), dict.fromkeys(c.model for _, c in mine), strict=False):
            points = [_point(q, c) for q, c in mine if c.model == model]
            axes.scatter(*zip(*points, strict=True), marker=marker, label=f"{model}, {mine[0][1].dtype}")
            for point, cell in zip(points, (c for _, c in mine if c.model == model), strict=True):
                text = f"{cell.batch} x {cell.context}"
                axes.annotate(text, point, xytext=(4, -6), textcoords="offset points", fontsize=6)
        axes.set(
            xscale="log", yscale="log", title=f"{card}, modelled, not measured",
            xlabel="operations a byte of weights, keys and values", ylabel="operations a second",
        )  # fmt: skip
        axes.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _roof(axes, question: Question) -> None:
    target = question.target
    intensities = [10 ** (step / 20) for step in range(-10, 61)]
    peak, bandwidth = target.tensor_tflops * 1e12, target.bandwidth * 1e9
    roof = [min(peak, bandwidth * intensity) for intensity in intensities]
    label = f"{target.bandwidth} GB/s, {target.tensor_tflops} Tflop/s"
    axes.plot(intensities, roof, color="black", linewidth=1, label=label)


def _point(question: Question, cell: Cell) -> tuple[float, float]:
    """Operations a byte, and a second, of what a step must compute: products and attention without padding."""
    config, modelled = question.config, cell.modelled
    assert modelled is not None and cell.bytes_per_token is not None
    itemsize = 4 if cell.dtype == "float32" else 2
    slots = sum(min(cell.context, config.window(layer) or cell.context) for layer in range(config.num_layers))
    caches = 2 * cell.batch * slots * config.num_kv_heads * config.head_dim * itemsize
    products = 2 * cell.batch * (cell.bytes_per_token - caches) / itemsize
    attention = 4 * cell.batch * slots * config.num_heads * config.head_dim
    operations = products + attention
    return operations / cell.bytes_per_token, operations / modelled.seconds_per_token[0]
