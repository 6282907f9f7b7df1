"""What the measured lines should reach: each target with its figure, "met" or "missed"."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from convert import N_CTX, SIZES, weights_of

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5}  # of a weight
OWN = ("ours", "base")
LONG, BASIC, WIDE = "1 x 1000", "1 x 128", "32 x 128"


@dataclass(frozen=True)
class Target:
    """A bound for a figure.

    Attributes:
        text: names the figure.
        bound: its limit; "at most" if `most`, else "at least".
        find: Lines -> the figure of each round, or nothing if it was not measured.
        unit: after the figure; none for a ratio.
    """

    text: str
    bound: float
    most: bool
    find: Callable
    unit: str = ""


class Lines:
    """The lines of a run, to be looked up."""

    def __init__(self, results):
        self.limits = results["limits"]
        self.all = [line for line in results["lines"] if "failed" not in line and line["figures"]]

    def get(self, job, case, tool, kind, figure="rate", size="124M"):
        """Return a figure of each round; nothing if it was not measured."""
        place = {"job": job, "case": case, "tool": tool, "kind": kind, "size": size}
        for line in self.all:
            if all(line[name] == value for name, value in place.items()):
                return line["figures"].get(figure, [])
        return []

    def best_peer(self, job, case, kind):
        """Return the rates of the fastest other program."""
        found = [
            line["figures"]["rate"]
            for line in self.all
            if (line["job"], line["case"], line["kind"]) == (job, case, kind)
            and line["tool"] not in OWN
            and line["size"] == "124M"
        ]
        return max(found, key=statistics.median, default=[])


def ratio(a, b):
    """Divide two lines' figures, round by round."""
    return [x / y for x, y in zip(a, b, strict=False)]


def starts():
    """Targets from nothing to the first token."""

    def start(case, tool, kind, size="124M"):
        return lambda lines: lines.get("start", case, tool, kind, "seconds", size)

    def compare(a, b):
        return lambda lines: ratio(a(lines), b(lines))

    tiny = [start("sample", tool, "", "tiny") for tool in OWN]
    yield Target("first token of tiny, `sample`: of base", 0.25, True, compare(*tiny))
    both = [start("first token", tool, "float32") for tool in ("ours", "llama")]
    yield Target("first token of 124M, float32: of llama.cpp", 1.3, True, compare(*both))
    yield Target("`--help`", 0.15, True, start("--help", "ours", "", ""), "s")
    for kind in ("float32", "int8"):
        ready = [start("serve is ready", tool, kind) for tool in OWN]
        yield Target(f"`serve` of 124M is ready, {kind}: of base", 0.5, True, compare(*ready))


def memories():
    """Targets of the memory after loading."""
    for kind, bound in (("float32", 1.15), ("int8", 1.2)):

        def of_weights(lines, kind=kind):
            total = BYTES[kind] * weights_of("124M") / 1e9
            found = lines.get("memory", "after loading", "ours", kind, "now")
            return [value / total for value in found]

        yield Target(f"memory of 124M, {kind}: of the weights", bound, True, of_weights)
    yield Target(
        "memory of 1558M, int4",
        1.2,
        True,
        lambda lines: lines.get("memory", "after loading", "ours", "int4", "now", "1558M"),
        "GB",
    )


def speeds(lines):
    """Targets of generation, beside base and other programs."""
    for line in lines.all:
        if line["job"] in ("generate", "growth") and line["tool"] == "base":
            place = (line["case"], line["kind"], line["job"])

            def of_base(lines, case, kind, job):
                return ratio(*(lines.get(job, case, tool, kind) for tool in OWN))

            text = f"{line['case']}, {line['kind']}: of base"
            yield Target(text, 1.0, False, lambda lines, place=place: of_base(lines, *place))

    def ours(case, kind):
        return lambda lines: lines.get("generate", case, "ours", kind)

    def peer(case, kind, tool):
        return lambda lines: lines.get("generate", case, tool, kind)

    for text, bound, a, b in (
        (f"{LONG}, int8: of {BASIC}", 0.8, ours(LONG, "int8"), ours(BASIC, "int8")),
        (f"{LONG}, int8: of llama.cpp", 1.2, ours(LONG, "int8"), peer(LONG, "int8", "llama")),
        (
            *(f"{LONG}, float32: of CTranslate2", 1.1),
            *(ours(LONG, "float32"), peer(LONG, "float32", "ctranslate2")),
        ),
        (
            *(f"{WIDE}, int8: of the best other program", 1.3, ours(WIDE, "int8")),
            lambda lines: lines.best_peer("generate", WIDE, "int8"),
        ),
        (
            *(f"{WIDE}, bfloat16: of llama.cpp", 1.0),
            *(ours(WIDE, "bfloat16"), peer(WIDE, "bfloat16", "llama")),
        ),
    ):
        yield Target(text, bound, False, lambda lines, a=a, b=b: ratio(a(lines), b(lines)))


def tricks():
    """Targets of prompt look-up and of common beginnings."""
    for case, bound in (("repetitive text", 1.5), ("nothing to find", 0.97)):
        for kind in ("float32", "int8"):

            def on_off(lines, case=case, kind=kind):
                kinds = (f"{kind}, look-up {switch}" for switch in ("on", "off"))
                return ratio(*(lines.get("lookup", case, "ours", k) for k in kinds))

            yield Target(f"look-up, {case}, {kind}: of without", bound, False, on_off)
    for kind in ("float32", "int8"):

        def shared(lines, kind=kind):
            kinds = (f"{kind}, {count}" for count in ("32 requests", "1 request"))
            case = "512 shared tokens"
            return ratio(*(lines.get("prefix", case, "ours", k, "cpu") for k in kinds))

        text = f"CPU of 32 requests that share 512 tokens, {kind}: of one"
        yield Target(text, 1.3, True, shared)


def training():
    """Targets of a training step."""
    case = f"1 x {N_CTX}"
    for kind in ("float32", "bfloat16"):

        def of_base(lines, kind=kind):
            return ratio(*(lines.get("train", case, tool, kind) for tool in OWN))

        yield Target(f"train, {kind}: of base", 1.15, False, of_base)

    def peaks(lines):
        ours = lines.get("train", case, "ours", "bfloat16, recomputed", "peak")
        theirs = ("transformers", "bfloat16 (autocast), recomputed", "peak")
        return ratio(ours, lines.get("train", case, *theirs))

    text = "train, memory of bfloat16, recomputed: of transformers with autocast"
    yield Target(text, 1.0, True, peaks)


def highest_share(lines):
    """Return the largest share of a limit that a line reaches."""
    found = [share for line in lines.all if (share := of_limit(line, lines.limits)) is not None]
    return [max(found)] if found else []


def targets(results):
    """Return the rows of the table: target, figure, limit, verdict."""
    lines = Lines(results)
    limited = Target("highest share of a limit, of all lines", 1.0, True, highest_share)
    known = [*starts(), *memories(), *speeds(lines), *tricks(), *training(), limited]
    return [row(target, target.find(lines)) for target in known]


def row(target, found):
    """Return the texts of one target; the median decides, rounded to two digits."""
    word = "at most" if target.most else "at least"
    unit = f" {target.unit}" * bool(target.unit)
    limit = f"{word} {target.bound:g}{unit}"
    if not found:
        return [target.text, "not measured", limit, ""]
    middle = round(statistics.median(found), 2)
    met = middle <= target.bound if target.most else middle >= target.bound
    figure = f"{middle:.2f}{unit} ({min(found):.2f} to {max(found):.2f})"
    return [target.text, figure, limit, "met" if met else "**missed**"]


def of_limit(line, limits):
    """Return the share of the machine's limit that a line reaches, or None; see README.md.

    A product may be computed in a wider format than the weights have, so the fastest format counts.
    """
    if line["job"] not in ("generate", "growth", "train") or not limits:
        return None
    kind = line["kind"].replace(",", " ").split()[0]
    wider = [name for name in BYTES if BYTES[name] >= BYTES[kind] and name in limits]
    product = max((limits[name][0] for name in wider), default=None)
    if product is None:
        return None
    size, used = line["size"], weights_of(line["size"], positions=False)
    rate = statistics.median(line["figures"]["rate"])
    if line["job"] == "train":
        n_layer, _, n_embd = SIZES[size]
        return rate / (product / (6 * used + 6 * n_layer * n_embd * N_CTX))
    batch = int(line["case"].split()[0])
    return rate / min(batch * reading(BYTES[kind] * used, limits), product / (2 * used))


def reading(weights, limits):
    """Return how often per second the weights can be read: the fastest rate of arrays as large."""
    sizes = {int(name.split()[1]): limits[name][0] for name in limits if name.startswith("read")}
    fit = [size for size in sizes if size * 2**20 <= weights]
    smallest = max(fit, default=min(sizes))
    return max(rate for size, rate in sizes.items() if size >= smallest) / weights
