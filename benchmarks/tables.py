"""The numbers of run.py as Markdown."""

import statistics

from convert import weights_of
from targets import BYTES, of_limit, targets

TOLERANCES = {"float32": 1e-5, "int4": 3e-2}  # of a loss, relative to the graph's; else 0.5 %
COLUMNS = {  # of a job: head and figure; "to ours", "of the limit", "of the weights" are computed
    "generate": (("tokens/s", "rate"), "to ours", "of the limit", ("peak GB", "peak")),
    "train": (("tokens/s", "rate"), "to ours", "of the limit", ("peak GB", "peak")),
    "encode": (("MB/s", "rate"), "to ours", ("vocabulary, s", "loading"), ("peak GB", "peak")),
    "start": (("seconds", "seconds"), "at first", ("user CPU s", "user"), ("peak GB", "peak")),
    "memory": (
        *(("GB after loading", "now"), "of the weights", ("peak", "peak")),
        *(("private", "private"), ("shared", "shared"), ("of files", "files")),
    ),
    "lookup": (("tokens/s", "rate"), ("CPU s", "cpu")),
    "prefix": (("seconds", "seconds"), ("CPU s", "cpu")),
}
COLUMNS["growth"] = COLUMNS["generate"]


def report(results):
    """All tables, under a few lines that say what was measured where; the targets come first."""
    parts = head(results)
    if rows := targets(results):
        parts.append("**targets**\n\n" + markdown([["target", "figure", "limit", ""], *rows]))
    cases = dict.fromkeys(_place(line) for line in results["lines"])
    for place in cases:
        lines = [line for line in results["lines"] if _place(line) == place]
        lines = [line for line in lines if "failed" in line or line["figures"]]
        if lines:
            title = ", ".join(part for part in place if part)
            parts.append(f"**{title}**\n\n{table(lines, results['limits'])}")
    return "\n\n".join(parts)


def head(results):
    """The paragraphs above the tables."""
    found = "; ".join(
        f"{tool}: " + ", ".join(f"{name} {version}" for name, version in found.items())
        for tool, found in results["versions"].items()
    )
    parts = [
        f"{results['machine']}; {found}. Load of the machine before the run: "
        f"{results['load_before']:.1f}; median (lowest to highest) of {results['rounds']} rounds."
    ]
    limits = results["limits"]
    if limits:
        reading = [name for name in limits if name.startswith("read")]
        reading.sort(key=lambda name: int(name.split()[1]))
        parts.append(
            "Limits: GB/s read from "
            + ", ".join(f"{name.split()[1]} MB {limits[name][0] / 1e9:.1f}" for name in reading)
            + "; GFLOP/s of matrix products in "
            + ", ".join(
                f"{kind} {limits[kind][0] / 1e9:,.0f} ({limits[kind][1]})"
                for kind in limits
                if kind not in reading
            )
            + "."
        )
    if results["skipped"]:
        parts.append(f"Left out: {'; '.join(results['skipped'])}.")
    if right := results["losses"].get("graph"):
        apart = {kind: loss / right - 1 for kind, loss in results["losses"].items()}
        parts.append(
            "Loss of ours on a random text, in nats per token: "
            + ", ".join(
                f"{kind} {results['losses'][kind]:.5f} ({share:+.1e}"
                + (", TOO FAR)" if abs(share) > TOLERANCES.get(kind, 5e-3) else ")")
                for kind, share in apart.items()
            )
            + "."
        )
    return parts


def _place(line):
    return line["job"], line["size"], line["case"]


def table(lines, limits):
    """The lines of one case."""
    columns = COLUMNS[lines[0]["job"]]
    heads = [column if isinstance(column, str) else column[0] for column in columns]
    rows = [["program", "", *heads]]
    for line in lines:
        kind = line["kind"] + " (differs)" * line.get("differs", False)
        if "failed" in line:
            rows.append([line["tool"], kind, f"failed: {line['failed']}"])
            rows[-1] += [""] * (len(heads) - 1)
            continue
        rows.append([line["tool"], kind, *(cell(c, line, lines, limits) for c in columns)])
    return markdown(rows)


def markdown(rows):
    """The rows as a table; the first are its heads, and numbers are right-aligned."""
    rows = [rows[0], ["---", "---", *["---:"] * (len(rows[0]) - 2)], *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(column, line, lines, limits):
    """The text of a column in a line."""
    figures = line["figures"]
    if column == "to ours":
        return ratio(line, lines)
    if column == "at first":
        return show(line["first"]["seconds"]) if "first" in line else ""
    if column == "of the weights":
        return f"{statistics.median(figures['now']) / gigabytes(line):.2f}"
    if column == "of the limit":
        share = of_limit(line, limits)
        return "" if share is None else f"{share:.0%}" + " PASSES THE LIMIT" * (share > 1)
    values = figures.get(column[1])
    if not values:
        return ""
    if column[1] in ("rate", "seconds", "cpu"):
        return f"{show(statistics.median(values))} ({show(min(values))} to {show(max(values))})"
    return show(max(values) if column[1] == "peak" else statistics.median(values))


def gigabytes(line):
    """The memory that the weights of a line's model need."""
    return BYTES[line["kind"]] * weights_of(line["size"]) / 1e9


def ratio(line, lines):
    """A rate over that of ours in the same format, or, where there is none, over our best."""
    if line["tool"] == "ours":
        return ""
    ours = [o for o in lines if o["tool"] == "ours" and "failed" not in o and o["figures"]]
    rates = {o["kind"]: statistics.median(o["figures"]["rate"]) for o in ours}
    if not rates:
        return "?"
    same = line["kind"].replace(" (autocast)", "").replace(" (whole)", "")
    same = same if same in rates else max(rates, key=rates.get)
    return f"{statistics.median(line['figures']['rate']) / rates[same]:.2f} of {same}"


def show(number):
    """Three digits."""
    return (
        f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"
    )
