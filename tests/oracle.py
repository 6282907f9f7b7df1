"""GPT-2 in NumPy, float64, written from the equations; shares no code with gpt2cli.

`slip` makes one known mistake, to show that a test's tolerance would catch it.
"""

import math

import numpy as np

SLIPS = ("erf gelu", "epsilon 1e-6", "unbiased variance", "swapped heads", "no scale", "no ln_f")


def norm(x, g, b, slip=None):
    epsilon = 1e-6 if slip == "epsilon 1e-6" else 1e-5
    variance = x.var(-1, keepdims=True, ddof=1 if slip == "unbiased variance" else 0)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + epsilon) * g + b


def gelu(x, slip=None):
    if slip == "erf gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "gelu_new": gelu,
    "gelu": lambda x: gelu(x, "erf gelu"),
    "relu": lambda x: np.where(x > 0, x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def logits(weights, n_head, tokens, slip=None, activation="gelu_new", scales=None):
    """Weights by OpenAI's names, ids [T] -> float64 [T, V]; `scales` of each layer's scores."""
    bend = ACTIVATIONS["gelu" if slip == "erf gelu" else activation]
    w = {name.removeprefix("model/"): np.asarray(v, np.float64) for name, v in weights.items()}
    x = w["wte"][tokens] + w["wpe"][: len(tokens)]
    length, width = x.shape
    head = width // n_head
    for layer in range(sum(name.endswith("ln_1/g") for name in w)):

        def leaf(name, h=f"h{layer}"):
            return w[f"{h}/{name}"]

        def linear(x, name, leaf=leaf):
            return x @ leaf(f"{name}/w")[0] + leaf(f"{name}/b")

        a = norm(x, leaf("ln_1/g"), leaf("ln_1/b"), slip)
        q, k, v = np.split(linear(a, "attn/c_attn"), 3, axis=-1)
        out = np.zeros_like(x)
        for h in range(n_head):
            cut = slice(h * head, (h + 1) * head)
            scores = q[:, cut] @ k[:, cut].T
            scale = 1 / math.sqrt(head) if scales is None else scales[layer]
            scores = scores if slip == "no scale" else scores * scale
            scores = np.where(np.tril(np.ones([length, length], bool)), scores, -np.inf)
            place = n_head - 1 - h if slip == "swapped heads" else h
            out[:, place * head : (place + 1) * head] = softmax(scores) @ v[:, cut]
        x = x + linear(out, "attn/c_proj")
        m = norm(x, leaf("ln_2/g"), leaf("ln_2/b"), slip)
        x = x + linear(bend(linear(m, "mlp/c_fc")), "mlp/c_proj")
    if slip != "no ln_f":
        x = norm(x, w["ln_f/g"], w["ln_f/b"], slip)
    return x @ w["wte"].T


def loss(weights, n_head, tokens):
    """Mean nats a token over the T - 1 targets."""
    scores = logits(weights, n_head, tokens[:-1])
    log_sum = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
    return float(np.mean(log_sum - scores[np.arange(len(tokens) - 1), tokens[1:]]))


def next_probs(scores, seen=(), temperature=1.0, top_k=0, top_p=0.0, repetition_penalty=1.0):
    """One row of logits [V] -> the probabilities that a sampler must draw from, by sorting."""
    scores = np.array(scores, np.float64)
    for token in set(seen):
        s = scores[token]
        scores[token] = s / repetition_penalty if s > 0 else s * repetition_penalty
    scores = scores / temperature
    if top_k:
        scores[scores < np.sort(scores)[-min(top_k, len(scores))]] = -np.inf
    if top_p:
        order = np.argsort(-scores, kind="stable")
        before = np.cumsum(softmax(scores)[order]) - softmax(scores)[order]
        scores[order[before >= top_p]] = -np.inf
    return softmax(scores)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def repeats(row, size):
    """The tokens after which the last `size` of the row would be in it twice."""
    start = len(row) - size + 1
    if start < 0:
        return set()
    tail = row[start:]
    return {row[i + size - 1] for i in range(start) if row[i : i + size - 1] == tail}


def beam_search(log_probs, prompt, beams, length, penalty=1.0, ends=(), change=None, stops=None):
    """Beam search over plain lists, with every continuation sorted.

    Args:
        log_probs: function of a row of ids -> [V].
        change: function of a row and its log-probabilities -> those to rank by.
        stops: function of the generated ids -> whether they end there.

    Returns:
        The best, at most `beams`: tuples of score and generated ids, with the end token.
    """
    running, done = [(0.0, [])], []
    for count in range(1, length + 1):
        everything = []
        for total, tokens in running:
            row = prompt + tokens
            scores = log_probs(row)
            scores = change(row, scores) if change else scores
            everything += [(total + s, [*tokens, t]) for t, s in enumerate(scores) if s > -np.inf]
        everything.sort(key=lambda item: -item[0])
        running = []
        for place, (total, tokens) in enumerate(everything[: max(2, 1 + len(ends)) * beams]):
            if count == length or tokens[-1] in ends or (stops and stops(tokens)):
                done += [(total / count**penalty, tokens)] if place < beams else []
            else:
                running.append((total, tokens))
        running = running[:beams]
        done = sorted(done, key=lambda item: -item[0])[:beams]
        full = len(done) == beams
        if not running or (full and running[0][0] / count**penalty <= done[-1][0]):
            break
    return done
