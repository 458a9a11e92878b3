# SPDX-License-Identifier: MIT
"""Finished runs: their table, and the pictures of one.

    python tests/runs.py                 # the runs under runs/, a line of a Markdown table each
    python tests/runs.py runs/MY-RUN     # writes loss.svg and tsne.svg into that folder
"""

import csv
import json
import math
import sys
from html import escape
from pathlib import Path

import numpy as np
from sklearn.manifold import TSNE

COLOURS = ["#888888", "#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2",
           "#bcbd22", "#17becf"]
WIDTH, HEIGHT = 380, 220  # of a panel, in pixels


def read_log(run):
    """The lines of a run's log.csv, of numbers."""
    with open(run / "log.csv") as file:
        return [{name: float(value) for name, value in line.items()}
                for line in csv.DictReader(file)]


def table(folder):
    """The finished runs below a folder as a Markdown table."""
    names = "run script dataset alpha epochs seed loss test raw untrained seconds".split()
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for path in sorted(folder.glob("**/result*.json")):
        config = json.loads((path.parent / "config.json").read_text())
        if "train_examples" not in config:  # a run of an earlier version
            continue
        result, log = json.loads(path.read_text()), read_log(path.parent)
        per_epoch = config["train_examples"] // config["batch_size"] * config["batch_size"]
        seconds = sum(per_epoch / line["examples_per_s"] for line in log)
        score = "test_r2" if "test_r2" in result else "test_accuracy"
        scores = [result.get(name) for name in (score, f"raw_{score}", f"untrained_{score}")]
        cells = [path.parent.relative_to(folder), config["script"], config["dataset"],
                 config["alpha"], len(log), config["seed"], f"{log[-1]['loss']:.4f}",
                 *("" if value is None else f"{value:.4f}" for value in scores), f"{seconds:,.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def pictures(run):
    """Write loss.svg, and tsne.svg of up to 2,000 representations before and after training."""
    points = [(line["epoch"], line["loss"]) for line in read_log(run)]
    (run / "loss.svg").write_text(svg([("loss", {"loss": points})]))
    saved = np.load(run / "features.npz")
    shown = np.flatnonzero(saved["test"]) if saved["test"].any() else np.arange(len(saved["test"]))
    shown = np.random.default_rng(0).permutation(shown)[:2000]
    labels = np.full(len(shown), "example")
    if len(saved["classes"]):
        labels = np.where(saved["label"][shown] < 0, "no label",
                          saved["classes"][saved["label"][shown]])
    panels = []
    for title, name in (("before training", "untrained"), ("after training", "features")):
        tsne = TSNE(init="pca", perplexity=min(30, (len(shown) - 1) / 3), random_state=0)
        at = tsne.fit_transform(saved[name][shown])
        panels.append((title, {label: at[labels == label].tolist() for label in np.unique(labels)}))
    (run / "tsne.svg").write_text(svg(panels, dots=True))


# ---------------------------------------------------------------------------- a plain SVG writer
def svg(panels, dots=False):
    """Panels side by side, (title, {label: [(x, y), ...]}): lines over epochs, or dots and no axes.
    """
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(panels)}" '
             f'height="{HEIGHT}" font-family="sans-serif" font-size="11">',
             '<rect width="100%" height="100%" fill="white"/>']
    for i, (title, curves) in enumerate(panels):
        parts.append(f'<g transform="translate({i * WIDTH})">'
                     f'<text x="45" y="15" font-weight="bold">{escape(title)}</text>')
        xs, ys = zip(*(point for points in curves.values() for point in points))
        x_ticks, y_ticks = ticks((0, *xs)), ticks(ys)
        if dots:
            x_ticks, y_ticks = (min(xs), max(xs)), (min(ys), max(ys))
        left, right, top, bottom = 45, WIDTH - 95, 25, HEIGHT - 35

        def at(x, y):
            across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
            up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
            return (round(left + across * (right - left), 1),
                    round(bottom - up * (bottom - top), 1))

        if not dots:
            parts += axes(x_ticks, y_ticks, at)
        for number, (label, points) in enumerate(curves.items()):
            colour, points = COLOURS[number % len(COLOURS)], [at(*point) for point in points]
            if not dots:
                line = " ".join(f"{x},{y}" for x, y in points)
                parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" '
                             'stroke-width="1.5"/>')
            if dots or len(points) < 10:
                radius = 1.5 if dots else 3
                parts += [f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colour}"/>'
                          for x, y in points]
            parts.append(f'<text x="{right + 10}" y="{top + 14 * (number + 1)}" fill="{colour}">'
                         f'{escape(str(label)[:16])}</text>')
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def axes(x_ticks, y_ticks, at):
    """Lines across a panel, and the numbers beside and below it."""
    (left, bottom), (right, _) = at(x_ticks[0], y_ticks[0]), at(x_ticks[-1], y_ticks[0])
    parts = [f'<text x="{right}" y="{HEIGHT - 5}" text-anchor="end">epoch</text>']
    for tick in y_ticks:
        y = at(x_ticks[0], tick)[1]
        parts.append(f'<path d="M{left} {y}H{right}" stroke="#ddd"/>'
                     f'<text x="{left - 5}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x = at(tick, y_ticks[0])[0]
        parts.append(f'<text x="{x}" y="{bottom + 15}" text-anchor="middle">{tick:g}</text>')
    return parts


def ticks(values):
    """Four to eight round numbers around values."""
    low, high = min(values), max(values)
    if low == high:
        high += 1
    unit = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(unit * factor for factor in (1, 2, 5, 10) if (high - low) / (unit * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(k * step, 10) for k in range(first, last + 1)]


def main():
    if len(sys.argv) == 1:
        print(table(Path("runs")))
        return
    run = Path(sys.argv[1])
    if not (run / "features.npz").exists():
        sys.exit(f"{run} holds no finished run with features.npz")
    pictures(run)
    print(f"{run / 'loss.svg'}, {run / 'tsne.svg'}")


if __name__ == "__main__":
    main()
