"""The numbers of run.py as Markdown."""

import statistics

from convert import SIZES

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a weight
TOLERANCES = {"float32": 1e-5}  # of a loss, relative to the graph's; 0.5 % for the others
# Weights of matrices and vectors that every token meets: all but the positions' table.
WEIGHTS = (
    SIZES["n_vocab"] * SIZES["n_embd"]
    + SIZES["n_layer"] * (12 * SIZES["n_embd"] ** 2 + 13 * SIZES["n_embd"])
    + 2 * SIZES["n_embd"]
)
ATTENTION = 6 * SIZES["n_layer"] * SIZES["n_embd"] * SIZES["n_ctx"]  # FLOP a token, training
HEADS = {"generate": "tokens/s", "train": "tokens/s", "encode": "MB/s", "start": "seconds"}


def report(results):
    """All tables, under a few lines that say what was measured where."""
    limits = results["limits"]
    found = "; ".join(
        f"{tool}: " + ", ".join(f"{name} {version}" for name, version in found.items())
        for tool, found in results["versions"].items()
    )
    parts = [
        f"{results['machine']}; {found}. Load of the machine before: "
        f"{results['load_before']:.1f}; median (lowest to highest) of {results['rounds']} rounds.",
        f"Limits: {limits['bandwidth'] / 1e9:.1f} GB/s read from memory; matrix products in "
        + ", ".join(f"{kind} {limits[kind] / 1e9:,.0f}" for kind in BYTES)
        + " GFLOP/s.",
    ]
    if results["skipped"]:
        parts.append(f"Left out: {'; '.join(results['skipped'])}.")
    if right := results["losses"].get("graph"):
        apart = {kind: loss / right - 1 for kind, loss in results["losses"].items()}
        parts.append(
            "Loss of ours on a random text, nats a token: "
            + ", ".join(
                f"{kind} {results['losses'][kind]:.5f} ({share:+.1e}"
                + (", TOO FAR)" if abs(share) > TOLERANCES.get(kind, 5e-3) else ")")
                for kind, share in apart.items()
            )
            + "."
        )
    cases = dict.fromkeys((line["job"], line["case"]) for line in results["lines"])
    for job, case in cases:
        lines = [line for line in results["lines"] if (line["job"], line["case"]) == (job, case)]
        parts.append(f"**{job}, {case}**\n\n" + table(job, lines, limits))
    return "\n\n".join(parts)


def table(job, lines, limits):
    """The lines of one case."""
    limited = job in ("generate", "train")
    heads = ["program", "", HEADS[job]]
    heads += ["to ours"] * (job != "start") + ["of the limit"] * limited + ["peak GB"]
    rows = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for line in lines:
        kind = line["kind"] + " (differs)" * line.get("differs", False)
        kind += f", vocabulary {line['loading']:.2f} s" if line.get("loading") else ""
        if "failed" in line:
            rows.append([line["tool"], kind, f"failed: {line['failed']}"] + [""] * (len(heads) - 3))
            continue
        rate = statistics.median(line["rates"])
        row = [line["tool"], kind, f"{show(rate)} ({_range(line['rates'])})"]
        if job != "start":
            row.append(ratio(line, rate, lines))
        if limited:
            row.append(f"{rate / limit(job, line, limits):.0%}")
        rows.append([*row, f"{line['peak']:.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def ratio(line, rate, lines):
    """A rate over that of ours in the same format, or, where there is none, over our best."""
    if line["tool"] == "ours":
        return ""
    ours = {o["kind"]: statistics.median(o["rates"]) for o in lines if _is_ours(o)}
    if not ours:
        return "?"
    same = line["kind"].replace(" (autocast)", "").replace(" (whole)", "")
    same = same if same in ours else max(ours, key=ours.get)
    return f"{rate / ours[same]:.2f} of {same}"


def _is_ours(line):
    return line["tool"] == "ours" and "failed" not in line


def limit(job, line, limits):
    """Tokens a second that the machine allows; README.md says the formulas."""
    kind = line["kind"].replace(",", " ").split()[0]
    rate = limits[kind]
    if job == "train":
        return rate / (6 * WEIGHTS + ATTENTION)
    batch = int(line["case"].split()[0])
    return min(batch * limits["bandwidth"] / (BYTES[kind] * WEIGHTS), rate / (2 * WEIGHTS))


def show(number):
    """Three digits."""
    return (
        f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"
    )


def _range(numbers):
    return f"{show(min(numbers))} to {show(max(numbers))}"
