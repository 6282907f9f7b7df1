"""Draw how cost grows with tokens, batch and size: picture.py RESULTS.json PICTURE.svg.

RESULTS.json is what `run.py --json` wrote. The picture has no background, and its colours can be
read on white and on black.
"""

import json
import math
import statistics
import sys
from html import escape
from pathlib import Path

from convert import weights_of

KIND = "int8"
COLOURS = {"ours": "#e8590c", "llama": "#1c7ed6", "ctranslate2": "#2b9348"}
NAMES = {"ours": "gpt2cli", "llama": "llama.cpp", "ctranslate2": "CTranslate2"}
WIDTH, HEIGHT, LEFT, TOP, GAP = 230, 200, 50, 46, 70  # of a panel, and around it
GREY = "#808080"
TEXT = f'font-family="sans-serif" font-size="12" fill="{GREY}"'
GRID = f'stroke="{GREY}" stroke-opacity="0.35"'


def points(results):
    """Return {tool: [(size, batch, tokens, tokens per second)]} of all lines of KIND."""
    found = {tool: [] for tool in COLOURS}
    for line in results["lines"]:
        if line["job"] not in ("generate", "growth") or line["kind"] != KIND:
            continue
        if line["tool"] in found and line["figures"]:
            batch, tokens = (int(part) for part in line["case"].split(" x "))
            rate = statistics.median(line["figures"]["rate"])
            found[line["tool"]].append((line["size"], batch, tokens, rate))
    return {tool: sorted(values) for tool, values in found.items() if values}


def panels(found):
    """Return (head, name of the x axis, {tool: [(x, y)]}) of each panel."""

    def curve(wanted):
        return {tool: sorted(filter(None, map(wanted, rows))) for tool, rows in found.items()}

    def tokens(row):
        size, batch, tokens, rate = row
        return (tokens, 1000 / rate) if (size, batch) == ("124M", 1) else None

    def batch(row):
        size, batch, tokens, rate = row
        return (batch, rate) if (size, tokens) == ("124M", 128) else None

    def size(row):
        size, batch, tokens, rate = row
        return (weights_of(size) / 1e6, 1000 / rate) if (batch, tokens) == (1, 128) else None

    yield "ms per token", "new tokens, 124M, batch 1", curve(tokens)
    yield "tokens per second", "batch, 124M, 128 new tokens", curve(batch)
    yield "ms per token", "million weights, batch 1, 128 new tokens", curve(size)


def ticks(values):
    """Return powers of two around the values of an axis."""
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    step = max(1, (high - low) // 6)
    return [2.0**power for power in range(low, max(high, low + 1) + step, step)]


def panel(left, head, below, curves):
    """Yield the lines of one panel, both axes logarithmic."""
    every = [point for curve in curves.values() for point in curve]
    if not every:
        return
    xs, ys = (ticks(values) for values in zip(*every, strict=True))

    def x_of(value):
        return left + WIDTH * math.log(value / xs[0]) / math.log(xs[-1] / xs[0])

    def y_of(value):
        return TOP + HEIGHT * (1 - math.log(value / ys[0]) / math.log(ys[-1] / ys[0]))

    bottom = TOP + HEIGHT
    yield f'<text font-weight="bold" x="{left}" y="{TOP - 12}">{escape(head)}</text>'
    yield f'<text x="{left + WIDTH / 2}" y="{bottom + 36}" text-anchor="middle">{below}</text>'
    for value in xs:
        x = f"{x_of(value):.1f}"
        yield f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}" {GRID}/>'
        yield f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>'
    for value in ys:
        y = y_of(value)
        ends = f'x1="{left}" x2="{left + WIDTH}" y1="{y:.1f}" y2="{y:.1f}"'
        yield f"<line {ends} {GRID}/>"
        yield f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    for tool, curve in curves.items():
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in curve)
        colour = f'fill="none" stroke="{COLOURS[tool]}" stroke-width="2"'
        yield f'<polyline points="{path}" {colour}/>'
        for x, y in curve:
            place = f'cx="{x_of(x):.1f}" cy="{y_of(y):.1f}"'
            yield f'<circle {place} r="3" fill="{COLOURS[tool]}"/>'


def draw(results):
    """Return the picture as SVG."""
    found, body = points(results), []
    made = list(panels(found))
    for number, parts in enumerate(made):
        body += panel(LEFT + number * (WIDTH + GAP), *parts)
    for number, tool in enumerate(found):
        name = f"{NAMES[tool]}, {KIND}"
        place = f'x="{LEFT + 150 * number}" y="14" fill="{COLOURS[tool]}"'
        body.append(f'<text font-weight="bold" {place}>{name}</text>')
    box = f"0 0 {LEFT + len(made) * (WIDTH + GAP) - GAP // 2} {TOP + HEIGHT + 46}"
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" {TEXT}>'
    return "\n".join([start, *body, "</svg>"]) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    Path(sys.argv[2]).write_text(draw(json.loads(Path(sys.argv[1]).read_text())))
