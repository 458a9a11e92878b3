# SPDX-License-Identifier: MIT
"""Pictures in plain SVG: curves and dots over axes, and the README's picture of the idea.

    python tests/draw.py    # writes tests/pictures/idea.svg
"""

import csv
import math
from html import escape
from pathlib import Path

COLOURS = ["#888888", "#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2",
           "#bcbd22", "#17becf"]
WIDTH, HEIGHT = 380, 220  # of a panel, in pixels
INK, BLUE, ORANGE = "#808080", "#3d85c6", "#e08a3c"  # to be seen on white and on black


def read_log(run):
    """The lines of a run's log.csv, of numbers; what is empty is left out."""
    with open(run / "log.csv") as file:
        return [{name: float(value) for name, value in line.items() if value}
                for line in csv.DictReader(file)]


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


# ---------------------------------------------------------------------------- the idea
def idea():
    """i-Mix: two examples are mixed, and so are their virtual labels, two of N classes."""
    parts = []

    def line(path, colour=INK, width=1.5):
        parts.append(f'<path d="{path}" stroke="{colour}" stroke-width="{width}" fill="none"/>')

    def text(x, y, words, colour=INK):
        parts.append(f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="middle">{words}</text>')

    def example(x, y, strokes):
        line(f"M{x} {y}h64v64h-64z")
        for i, (colour, width) in enumerate(strokes):
            line(f"M{x + 10 + 11 * i} {y + 8}v48", colour, width)

    def arrow(x, y, to_x, to_y):
        line(f"M{x} {y}L{to_x} {to_y}m-7 -4l7 4l-7 4")

    example(20, 20, [(BLUE, 4)] * 5)
    example(20, 120, [(ORANGE, 4)] * 5)
    text(52, 103, "x\u1d62")
    text(52, 203, "x\u2c7c")
    arrow(92, 52, 166, 94)
    arrow(92, 152, 166, 114)
    text(128, 58, "\u03bb", BLUE)
    text(128, 166, "1 \u2212 \u03bb", ORANGE)
    example(174, 72, [(BLUE, 4), (ORANGE, 2)] * 2 + [(BLUE, 4)])
    text(212, 156, "\u03bb x\u1d62 + (1 \u2212 \u03bb) x\u2c7c")
    arrow(248, 104, 286, 104)
    line("M294 74h56v60h-56z")
    text(322, 109, "f")
    arrow(360, 104, 398, 104)

    names = ["v\u2081", "v\u2082", "v\u1d62", "\u2026", "v\u2c7c", "\u2026", "v\u2099"]
    shares = [0, 0, 0.7, 0, 0.3, 0, 0]
    line("M412 150h250")
    for k, (name, share) in enumerate(zip(names, shares)):
        x, colour = 430 + 36 * k, BLUE if k == 2 else ORANGE
        if share:
            line(f"M{x} 150v{-110 * share}", colour, 14)
        text(x, 168, name, colour if share else INK)
    text(502, 62, "\u03bb", BLUE)
    text(574, 106, "1 \u2212 \u03bb", ORANGE)
    text(537, 195, "N classes: other views of the examples")
    text(537, 30, "virtual label \u03bb v\u1d62 + (1 \u2212 \u03bb) v\u2c7c")
    return "\n".join(['<svg xmlns="http://www.w3.org/2000/svg" width="690" height="212" '
                      'font-family="sans-serif" font-size="14">', *parts, "</svg>", ""])


if __name__ == "__main__":
    (Path(__file__).parent / "pictures" / "idea.svg").write_text(idea())
