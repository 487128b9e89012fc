"""The figure of the benchmark: multiples of the floor, and of fastce's steps; a line per case, a mark per peer."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# This library's marks have one colour and lie on top.
MARKS = {"fastce": "o", "fastce, new": "o", "fastce, one thread": "o"}
OTHER_MARKS = "Dsv^<>PX"
OWN_COLOUR = "C3"
OTHER_COLOURS = ("C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9")
SCALE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]

Multiples = dict[str, dict[str, float]]


def save_plot(report: dict[str, Any], path: Path) -> None:
    """Draw what `bench.run` reports."""
    cases: Multiples = {}
    for case, result in report["cases"].items():
        seconds = dict(result["seconds"])
        floor = seconds.pop("floor")
        cases[f"{case}  ({1e3 * floor:.3g} ms)"] = {name: value / floor for name, value in seconds.items()}
    steps: Multiples = {}
    for step, seconds in report["steps"].items():
        own = seconds["fastce"]
        steps[f"{step}  ({1e3 * own:.3g} ms)"] = {name: value / own for name, value in seconds.items()}
    panels = [
        (cases, "loss and gradient, in multiples of the floor (in brackets): one read and one write of the logits"),
        (steps, "training step with two more products, in multiples of fastce's (in brackets)"),
    ]
    panels = [(multiples, label) for multiples, label in panels if multiples]
    names = list(dict.fromkeys(name for multiples, _ in panels for row in multiples.values() for name in row))
    heights = [1.2 + 0.36 * len(multiples) for multiples, _ in panels]
    figure = Figure(figsize=(9, 0.9 + sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (multiples, label) in zip(grid, panels, strict=True):
        draw(axes, multiples, names)
        axes.set_xlabel(label)
    title = f"{report['machine']['processor']}, {report['n_threads']} threads"
    grid[0].set_title(title, loc="left", fontsize="medium")
    handles = {name: handle for axes in grid for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend([handles[name] for name in names], names, loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)


def draw(axes: Axes, multiples: Multiples, names: list[str]) -> None:
    """Draw a line for each row, and on it a mark for each name."""
    axes.set_xscale("log")
    for y, row in enumerate(multiples.values()):
        axes.hlines(y, min(row.values()), max(row.values()), color="0.85", zorder=1)
    others = [name for name in names if name not in MARKS]
    for i, name in enumerate(names):
        points = [(row[name], y) for y, row in enumerate(multiples.values()) if name in row]
        if not points:
            continue
        is_own = name in MARKS
        colour = OWN_COLOUR if is_own else OTHER_COLOURS[others.index(name)]
        multiple, y_position = zip(*points, strict=True)
        axes.scatter(
            multiple,
            y_position,
            s=20 if name == "fastce, one thread" else 45,
            label=name,
            zorder=20 - i,
            marker=MARKS[name] if is_own else OTHER_MARKS[others.index(name)],
            color="white" if is_own and name != "fastce" else colour,
            edgecolors=colour,
        )
    axes.axvline(1, color="0.4", linewidth=1)
    axes.set_yticks(range(len(multiples)), list(multiples))
    axes.set_ylim(len(multiples) - 0.5, -0.5)
    most = max(value for row in multiples.values() for value in row.values())
    ticks = [tick for tick in SCALE if tick <= 1.5 * most]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
