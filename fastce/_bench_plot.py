"""The figure of the benchmark: multiples of the floor, one line per case and one mark per contender."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# This library's two marks are of one colour, and on top.
MARKS = "oDsv^<>PX"
COLOURS = ("C3", "C3", "C0", "C1", "C2", "C4", "C5", "C8", "C9")
SCALE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]  # multiples of the floor


def save_plot(report: dict[str, Any], path: Path) -> None:
    """Draw what `fastce._bench.run` reports."""
    cases = report["cases"]
    multiples = {
        case: {name: seconds / result["seconds"]["floor"] for name, seconds in result["seconds"].items()}
        for case, result in cases.items()
    }
    names = list(dict.fromkeys(name for case in multiples.values() for name in case if name != "floor"))
    figure = Figure(figsize=(9, 1.8 + 0.36 * len(cases)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    for y, case in enumerate(multiples.values()):
        axes.hlines(y, min(case.values()), max(case.values()), color="0.85", zorder=1)
    for i, name in enumerate(names):
        points = [(case[name], y) for y, case in enumerate(multiples.values()) if name in case]
        face = "white" if name == "fastce, new" else COLOURS[i]
        multiple, y_position = zip(*points, strict=True)
        axes.scatter(
            multiple,
            y_position,
            s=45,
            label=name,
            zorder=20 - i,
            marker=MARKS[i],
            color=face,
            edgecolors=COLOURS[i],
        )
    axes.axvline(1, color="0.4", linewidth=1)
    axes.set_yticks(
        range(len(cases)),
        [f"{case}  ({1e3 * result['seconds']['floor']:.3g} ms)" for case, result in cases.items()],
    )
    axes.invert_yaxis()
    axes.set_xticks(SCALE, [str(tick) for tick in SCALE])
    axes.minorticks_off()
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.set_xlabel("loss and gradient, in multiples of the floor (in brackets): one read and one write of the logits")
    axes.set_title(f"{report['machine']['processor']}, {report['n_threads']} threads", loc="left", fontsize="medium")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)
