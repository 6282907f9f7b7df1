"""The larger sizes in int8: generation, memory and the first token."""

from session import say
from worker import Failed

from jobs import generate, memory, start

SHAPES = ((1, 128), (8, 128))


def run(session):
    """Make each size, measure it, and remove it again."""
    for size in session.options.sizes:
        pairs = session.pairs(("int8", "int4"), generate.FEW)
        try:
            pairs = session.prepare(size, pairs)
        except Failed as error:
            say(f"{size}: {error}")
            session.skipped.append(f"{size} ({error})")
            continue
        try:
            start.first_token(session, pairs, size)
            memory.measure(session, pairs, size)
            generate.measure(session, "generate", pairs, SHAPES, size)
        finally:
            session.discard(size)
