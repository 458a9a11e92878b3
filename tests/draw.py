# SPDX-License-Identifier: MIT
"""The README's picture of the idea, in plain SVG.

    python tests/draw.py    # writes tests/pictures/idea.svg
"""

from pathlib import Path

INK, BLUE, ORANGE = "#808080", "#3d85c6", "#e08a3c"  # to be seen on white and on black


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
