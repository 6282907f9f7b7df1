"""The rules of sampling against NumPy and against the distribution; the loop against itself."""

import shutil

import numpy as np
import oracle
import pytest
from conftest import compiled, golden_models, golden_vocabulary, lively

from gpt2cli.errors import UsageError, UserError
from gpt2cli.inference import sampling
from gpt2cli.inference.engines import xla_rules
from gpt2cli.inference.generator import LanguageModel
from gpt2cli.inference.rows import Generation, Row
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.options import GenerateOptions
from gpt2cli.tensorflow import tf

ROWS = np.random.default_rng(0).normal(0, 3, [4, 300]).astype(np.float32)


def keep(how, logits, top_k=0, top_p=0.0):
    """bool [B, V]: what is left of each row; top_k and top_p may be one a row."""
    ks, ps = np.broadcast_to(top_k, len(logits)), np.broadcast_to(top_p, len(logits))
    if how == "tensorflow":
        logits = xla_rules.keep_top_k(logits, tf.constant(ks, tf.int32))
        return np.isfinite(xla_rules.keep_top_p(logits, tf.constant(ps, tf.float32)))
    left = np.zeros(logits.shape, bool)
    for row, k, p, found in zip(logits, ks, ps, left, strict=True):
        tokens = sampling.keep_top_k(row, k) if k else np.arange(len(row))
        mass = np.exp(row[tokens] - row.max())
        found[tokens[sampling.keep_top_p(mass, p)] if 0 < p < 1 else tokens] = True
    return left


both = pytest.mark.parametrize("how", ["numpy", "tensorflow"])


@both
@pytest.mark.parametrize("k", [1, 2, 17, 299, 300, 5000])
def test_top_k_keeps_the_k_likeliest_of_each_row(how, k):
    expected = [oracle.next_probs(row, top_k=k) > 0 for row in ROWS]
    np.testing.assert_array_equal(keep(how, ROWS, top_k=k), expected)


@both
def test_rules_may_differ_from_row_to_row(how):
    ks, ps = [0, 1, 5, 300], [0.0, 0.3, 0.9, 0.999]
    expected = [oracle.next_probs(row, top_k=k) > 0 for row, k in zip(ROWS, ks, strict=True)]
    np.testing.assert_array_equal(keep(how, ROWS, top_k=ks), expected)
    expected = [oracle.next_probs(row, top_p=p) > 0 for row, p in zip(ROWS, ps, strict=True)]
    np.testing.assert_array_equal(keep(how, ROWS, top_p=ps), expected)


@both
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99])
def test_top_p_keeps_the_token_that_crosses_p(how, p):
    expected = [oracle.next_probs(row, top_p=p) > 0 for row in ROWS]
    np.testing.assert_array_equal(keep(how, ROWS, top_p=p), expected)


@both
def test_the_nucleus_of_the_known_example_has_four_tokens(how):
    # probabilities .4 .3 .2 .06 .04 at p = .95: openai/gpt-2 keeps 3, nshepperd/gpt-2 keeps 4
    logits = np.log(np.array([[0.2, 0.04, 0.4, 0.06, 0.3]], np.float32))
    assert keep(how, logits, top_p=0.95).tolist() == [[True, False, True, True, True]]


@both
def test_top_p_of_one_keeps_everything_and_zero_turns_it_off(how):
    for p in (0.0, 1.0):
        assert keep(how, ROWS, top_p=p).all()


@both
def test_top_k_is_applied_before_top_p(how):
    expected = [oracle.next_probs(row, top_k=3, top_p=0.6) > 0 for row in ROWS]
    np.testing.assert_array_equal(keep(how, ROWS, top_k=3, top_p=0.6), expected)


@both
def test_tokens_that_tie_are_kept_together(how):
    logits = np.array([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]], np.float32)
    expected = [[False, True, True, True, True, False]]
    assert keep(how, logits, top_k=2).tolist() == keep(how, logits, top_p=0.5).tolist() == expected


@both
def test_repetition_penalty_is_that_of_the_paper(how):
    if how == "numpy":
        rule = sampling.Rules(repetition_penalty=1.3)
        got = np.stack([sampling.apply_rules(row, [1, 7, 250, 7], 0, rule) for row in ROWS])
    else:
        seen = np.zeros(ROWS.shape, bool)
        seen[:, [1, 7, 250]] = True
        got = xla_rules.penalize_repetition(ROWS, seen, tf.fill([4], 1.3))
    expected = [oracle.next_probs(r, seen=[1, 7, 250], repetition_penalty=1.3) for r in ROWS]
    np.testing.assert_allclose(tf.nn.softmax(got), expected, atol=1e-6)


def choose(how, logits, uniform, **settings):
    """The next token of each row; nothing came before."""
    if how == "numpy":
        rule = sampling.Rules(**settings)
        drawn = zip(logits, uniform, strict=True)
        return np.array([sampling.choose(row, u, [], 0, rule) for row, u in drawn])
    rows = [[]] * len(logits)
    rule = xla_rules.tensors_of([sampling.Rules(**settings)] * len(rows), False, logits.shape[1])
    generated = np.zeros(len(rows), np.int32)
    past = xla_rules.past_of(rows, generated, logits.shape[1], 1, 0)
    return xla_rules.choose(logits, uniform, past, rule)[0].numpy()


@both
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.7}],
)
def test_draws_follow_the_distribution_in_every_row_of_a_batch(how, settings):
    rows, draws, tokens = 4, 4000, (60 if settings else 300)  # of one block of `draw`, and of two
    logits = np.tile(ROWS[:, :tokens], [draws, 1])  # row after row, draw after draw, in one batch
    uniform = np.random.default_rng(5).random(rows * draws, np.float32)
    chosen = np.reshape(choose(how, logits, uniform, **settings), [draws, rows])
    for row in range(rows):
        probs = oracle.next_probs(ROWS[row, :tokens], **settings)
        counts = np.bincount(chosen[:, row], minlength=tokens)
        assert counts[probs == 0].sum() == 0
        often = probs * draws >= 5
        expected = np.append(probs[often], max(probs[~often].sum(), 1e-9)) * draws
        found = np.append(counts[often], counts[~often].sum())
        chi_square = ((found - expected) ** 2 / np.maximum(expected, 1)).sum()
        freedom = len(expected) - 1
        assert chi_square < freedom + 5 * np.sqrt(2 * max(freedom, 1)), (settings, row)


@both
def test_a_draw_never_falls_on_a_token_without_probability(how):
    logits = np.full([8, 1000], -np.inf, np.float32)
    logits[:, [3, 700]] = 0.0
    numbers = np.array([0, 0.25, 0.5, 0.75, 1 - 2**-24, 0.0, 0.4999, 0.5001], np.float32)
    chosen = choose(how, logits, numbers).tolist()
    assert set(chosen) == {3, 700}
    assert chosen[-3:] == [3, 3, 700]


@both
def test_temperature_zero_takes_the_likeliest_and_tiny_ones_do_not_overflow(how):
    for temperature in (0.0, 1e-9, 1e-4):
        chosen = choose(how, ROWS, np.full(4, 0.99, np.float32), temperature=temperature)
        np.testing.assert_array_equal(chosen, ROWS.argmax(-1))


PROMPTS = [[5, 6, 7], [90], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [33, 44]]


def test_greedy_generation_follows_the_equations(either_model, network):
    weights = {name: v.numpy() for name, v in network.weights.items()}
    tokens = [5, 6, 7]
    for _ in range(12):
        tokens.append(int(oracle.logits(weights, 4, np.array(tokens))[-1].argmax()))
    (sample,) = either_model.generate([5, 6, 7], length=12, temperature=0)
    assert sample.tokens == tokens[3:] and sample.finish_reason == "length"


@pytest.mark.parametrize("settings", [{}, {"top_k": 9}, {"top_p": 0.8, "repetition_penalty": 1.4}])
def test_a_sample_does_not_depend_on_its_batch(either_model, settings):
    settings = dict(length=40, seed=11, **settings)  # 40 is past the window of 24
    alone = either_model.generate(PROMPTS, batch_size=1, **settings)
    for size in (3, 4):
        batched = either_model.generate(PROMPTS, batch_size=size, **settings)
        assert [s.tokens for s in batched] == [s.tokens for s in alone]
    assert [len(s.tokens) for s in alone] == [40] * 4


def test_samples_of_a_prompt_differ_and_a_seed_brings_them_back(plain_model):
    first = plain_model.generate([5], nsamples=5, batch_size=2, length=20, seed=1)
    again = plain_model.generate([5], nsamples=5, batch_size=5, length=20, seed=1)
    other = plain_model.generate([5], nsamples=5, batch_size=5, length=20, seed=2)
    assert [s.tokens for s in first] == [s.tokens for s in again]
    assert len({tuple(s.tokens) for s in first + other}) == 10
    assert [s.index for s in first] == [0, 1, 2, 3, 4] and first[0].seed == 1


def test_a_seed_that_was_not_given_is_drawn_and_reported(plain_model):
    (one,) = plain_model.generate([5], length=10)
    (same,) = plain_model.generate([5], length=10, seed=one.seed)
    assert one.tokens == same.tokens


def greedy(network, prompt, count, window="half", ngram=0):
    """The rules, restated: generated ids and their log-probabilities.

    half: at 24 tokens the last 12 stay, and positions begin at 0 again. last: as the loop over
    `row[-23:]`. A repeated n-gram is one of the whole row.
    """
    row, logprobs, begin = list(prompt), [], max(0, len(prompt) - 24)
    for _ in range(count):
        if len(row) - begin > 24:
            begin = len(row) - 12
        seen = row[begin:] if window == "half" else row if len(row) < 24 else row[-23:]
        scores = oracle.log_softmax(network(np.array([seen]))[0, -1])
        allowed = scores.copy()
        if ngram:
            allowed[list(oracle.repeats(row, ngram))] = -np.inf
        row.append(int(allowed.argmax()))
        logprobs.append(scores[row[-1]])
    return row[len(prompt) :], logprobs


def test_past_the_window_the_newer_half_is_read_again(either_model, network):
    (sample,) = either_model.generate([5, 6, 7], length=50, temperature=0)
    assert sample.tokens == greedy(network, [5, 6, 7], 50)[0]


MIXED = [*PROMPTS, list(range(23)), list(range(24)), list(range(60))]  # around the window of 24


@pytest.mark.parametrize("size", [4])
def test_with_window_last_every_token_follows_the_last_ones_read_again(plain_model, network, size):
    settings = dict(length=30, temperature=0, window="last", batch_size=size)
    for prompt, sample in zip(MIXED, plain_model.generate(MIXED, **settings), strict=True):
        assert sample.tokens == greedy(network, prompt, 30, "last")[0]


def test_a_window_of_one_token_is_no_special_case():
    sizes = ModelConfig(n_vocab=11, n_ctx=1, n_embd=8, n_head=2, n_layer=1)
    model = LanguageModel(compiled("lite", lively(sizes)), None)
    for window in ("half", "last"):
        (sample,) = model.generate([3, 4], length=5, temperature=0, window=window)
        row = [4]
        for _ in range(5):
            row.append(int(model.logits(row[-1:])[-1].argmax()))
        assert sample.tokens == row[1:]


@both
@pytest.mark.parametrize("size", [1, 2, 3, 5, 40, 2**31 - 1])
def test_repeated_ngrams_are_found_wherever_they_are(how, size):
    random = np.random.default_rng(size % 1000)
    lengths = np.array([1, 2, 5, 17, 31], np.int32)
    for room in (32, 64):
        rows = random.integers(4, size=[5, room]).astype(np.int32)
        past = xla_rules.Past(None, rows, lengths, None)
        logits = random.normal(size=[5, 7]).astype(np.float32)
        if how == "tensorflow":
            found = np.array(xla_rules.forbid_repeats(logits, past, tf.fill([5], size)))
        else:
            rule = sampling.Rules(no_repeat_ngram=size)
            before = zip(logits, rows, lengths, strict=True)
            found = [sampling.apply_rules(one, row[:n], 0, rule) for one, row, n in before]
        for row, length, left, before in zip(rows, lengths, found, logits, strict=True):
            banned = sorted(oracle.repeats(row[:length].tolist(), size))
            assert np.flatnonzero(np.isinf(left)).tolist() == banned
            assert (left == before)[np.isfinite(left)].all()


def grown(network, rows):
    """The tokens of Rows that have grown to their ends together."""
    together = Generation(network, rows, width=len(rows))
    while not together.is_empty():
        together.step()
    return [row.tokens for row in rows]


@pytest.mark.parametrize(
    "ngram, window", [pytest.param(1, "half", marks=pytest.mark.slow), (3, "last")]
)
def test_no_ngram_comes_twice_in_a_row_of_any_length(plain_model, network, ngram, window):
    settings = dict(length=40, temperature=0, no_repeat_ngram=ngram, window=window, batch_size=4)
    prompts = [[*p, *p] for p in MIXED[:3]] + MIXED[3:6] if ngram > 1 else MIXED[:6]
    for prompt, sample in zip(prompts, plain_model.generate(prompts, **settings), strict=True):
        count = min(40, 97 - len(prompt)) if ngram == 1 else 40
        assert sample.tokens[:count] == greedy(network, prompt, count, window, ngram)[0]


@pytest.mark.parametrize(
    "either", ["lite", pytest.param("graph", marks=pytest.mark.slow)], indirect=True
)
def test_rows_that_end_do_not_disturb_the_ngrams_of_the_others(either):
    rules = sampling.Rules(temperature=0.9, no_repeat_ngram=2, ends=(3,))
    alone = [
        grown(either, [Row(prompt, rules, 70, 1, index)])[0] for index, prompt in enumerate(PROMPTS)
    ]
    rows = [Row(prompt, rules, 70, 1, index) for index, prompt in enumerate(PROMPTS)]
    assert grown(either, rows) == alone
    assert len({len(row) for row in alone}) > 2  # some ended early
    for row, prompt in zip(alone, PROMPTS, strict=True):
        assert all(row[i] not in oracle.repeats(row[:i], 2) for i in range(len(prompt), len(row)))


def test_where_every_token_would_repeat_none_is_banned(plain_model):
    (sample,) = plain_model.generate([5], length=120, temperature=0, no_repeat_ngram=1)
    assert sorted(sample.tokens[:96]) == [t for t in range(97) if t != 5]
    assert len(sample.tokens) == 120


@pytest.mark.parametrize("window", ["half", "last"])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0, "repetition_penalty": 1.5, "no_repeat_ngram": 2}]
)
def test_logprobs_are_the_models_own(plain_model, network, settings, window):
    settings = dict(length=45, seed=3, window=window, top_k=30, logprobs=True, **settings)
    samples = plain_model.generate(MIXED, batch_size=3, **settings)
    assert len(samples) == len(MIXED) >= 2
    for sample in samples:
        assert len(sample.logprobs) == len(sample.tokens) == 45
        row, begin = list(sample.prompt), max(0, len(sample.prompt) - 24)
        for token, logprob in zip(sample.tokens, sample.logprobs, strict=True):
            if len(row) - begin > 24:
                begin = len(row) - 12
            seen = row[begin:] if window == "half" else row if len(row) < 24 else row[-23:]
            expected = oracle.log_softmax(plain_model.logits(seen)[-1])[token]
            assert logprob == pytest.approx(expected, abs=1e-4)
            row.append(token)
    assert plain_model.generate([5], length=3)[0].logprobs is None


def test_the_likeliest_tokens_are_kept_beside_the_chosen_ones(either_model, network):
    settings = GenerateOptions(length=30, seed=3, logprobs=True)
    rows = [either_model.begin(n, prompt, settings, 3) for n, prompt in enumerate(([5, 6], [7]))]
    together = Generation(either_model.network, rows, width=2)
    while not together.is_empty():
        assert together.step(7)
    for row in rows:
        assert len(row.likeliest) == len(row.logprobs) == 30
        for place, (found, logprob) in enumerate(zip(row.likeliest, row.logprobs, strict=True)):
            seen = row.tokens[: row.prompt_length + place][-23:]
            if place < 20:  # before the window slides
                expected = oracle.log_softmax(either_model.logits(seen)[-1])
                assert list(found) == np.argsort(-expected)[:5].tolist()
                np.testing.assert_allclose(list(found.values()), np.sort(expected)[::-1][:5], 1e-4)
            chosen = row.tokens[row.prompt_length + place]
            assert logprob == pytest.approx(found.get(chosen, logprob)) and logprob < 1e-6


@pytest.mark.parametrize(
    "either", ["lite", pytest.param("graph", marks=pytest.mark.slow)], indirect=True
)
def test_rows_that_join_and_leave_are_what_they_are_alone(either):
    """To the last bit on a CPU's programs; windows slide, and rows wait for a place."""
    random = np.random.default_rng(5)
    rules = [
        sampling.Rules(temperature=1.3, top_k=int(k), no_repeat_ngram=int(n))
        for k, n in random.integers(0, 6, [12, 2])
    ]

    def row(index):
        size = np.random.default_rng(index)
        prompt = size.integers(97, size=size.integers(1, 30)).tolist()
        window = "last" if index == 4 else "half"
        length = int(size.integers(1, 60))
        return Row(prompt, rules[index], length, 9, index, window, logprobs=True)

    alone = [row(index) for index in range(12)]
    for one in alone:
        grown(either, [one])
    rows, waiting = [row(index) for index in range(12)], list(range(12))
    batch = Generation(either, width=4)
    while waiting or not batch.is_empty():
        while waiting and len(batch.live()) < 4 and random.random() < 0.5:
            batch.add([rows[waiting.pop(0)]])
        if len(waiting) == 3:
            rows[8].finished |= random.random() < 0.2  # somebody goes away
        batch.step(int(random.integers(1, 8)))
    for one, other in zip(alone, rows, strict=True):
        assert other.tokens == one.tokens[: len(other.tokens)]
        assert other.tokens == one.tokens or one is alone[8]
        if either.needs_full_batches:
            np.testing.assert_allclose(other.logprobs, one.logprobs[: len(other.logprobs)], 1e-4)
        else:
            assert other.logprobs == one.logprobs[: len(other.logprobs)]


def test_of_a_prompt_longer_than_the_window_the_end_is_read(either_model):
    long = list(np.arange(60) % 97)
    (sample,) = either_model.generate(long, length=1, temperature=0)
    assert sample.tokens == [int(either_model.logits(long[-24:])[-1].argmax())]


@pytest.mark.slow  # a quarter of a minute of compiling
def test_nothing_is_traced_again_however_many_prompts_follow(network):
    ready = compiled("graph", network)
    model = LanguageModel(ready, None)
    random = np.random.default_rng(0)
    for n in range(6):
        prompt = random.integers(97, size=random.integers(1, 40)).tolist()
        size = int(random.integers(1, 4))
        settings = dict(length=int(random.integers(1, 30)), no_repeat_ngram=n % 3)
        model.generate([prompt] * size, batch_size=size, **settings)
        if n % 3:
            model.generate([prompt], beams=2, **settings)
    model.loss(prompt * 5)
    model.logits(prompt[:20])
    programs = [p for p in vars(ready).values() if hasattr(p, "experimental_get_tracing_count")]
    assert [program.experimental_get_tracing_count() for program in programs] == [1] * 5


def test_the_loop_ends_when_every_row_has_ended(either, monkeypatch):
    """With an end token that comes early, far fewer than `length` steps are computed."""
    rules = sampling.Rules(temperature=0.0)
    tokens = grown(either, [Row([5], rules, 30)])[0][1:]
    at = next(i for i in range(3, 30) if tokens[i] not in tokens[:i])
    ends = tokens[at], 96 if tokens[at] != 96 else 95
    steps = []
    run = either.run

    def counted(*arguments, **more):
        result = run(*arguments, **more)
        steps.append(result.tokens.shape[1])
        return result

    monkeypatch.setattr(either, "run", counted)
    rows = [Row([5], rules._replace(ends=ends), 30, 1, index) for index in (0, 1)]
    assert [row[1:] for row in grown(either, rows)] == [tokens[:at], tokens[:at]]
    assert sum(steps) == at  # the first token comes from the prompt's pass


@pytest.mark.parametrize("ends", [(), (3,), (90, 3, 4)])
def test_a_row_ends_before_the_first_of_any_end_tokens(either, ends):
    """As transformers' generate does with a list as eos_token_id: the row without it, cut there."""
    rules = sampling.Rules(temperature=3.0)
    free = grown(either, [Row([5], rules, 120, 1, index) for index in range(4)])
    rows = [Row([5], rules._replace(ends=ends), 120, 1, index) for index in range(4)]
    expected = []
    for row in free:
        cut = next((n for n, token in enumerate(row) if token in ends), len(row))
        expected.append(row[:cut])
    assert grown(either, rows) == expected
    assert {len(row) for row in expected} == {121} or ends
    assert len({len(row) for row in expected}) > 1 or not ends


@pytest.mark.parametrize("ends", [(3,), (3, 4, 5, 6)])
def test_before_the_minimal_length_no_end_token_is_chosen(either, ends):
    for minimum in (0, 5, 9):
        rules = sampling.Rules(min_length=minimum, temperature=3.0, ends=ends)
        rows = grown(either, [Row([7], rules, 10, 1, index) for index in range(20)])
        assert not set(ends) & {token for row in rows for token in row}
        assert min(len(row) - 1 for row in rows) >= minimum
        assert min(len(row) - 1 for row in rows) < 10 or minimum == 9 or len(ends) == 1


def test_the_number_of_end_tokens_costs_no_compilation():
    """XLA compiles the loop again for other shapes."""
    rules = [sampling.Rules(ends=ends) for ends in ((), (3,), (3, 4, 5))]
    tensors = [xla_rules.tensors_of([rule, rule], False, 97) for rule in rules]
    assert len({tuple(np.shape(value) for value in one) for one in tensors}) == 1
    assert [int(one.ends.sum()) for one in tensors] == [0, 1, 3]


def test_a_banned_token_is_never_chosen(either):
    rules = sampling.Rules(temperature=5.0, banned=tuple(range(0, 97, 2)))
    (row,) = grown(either, [Row([5], rules, 200)])
    assert len(row) == 201 and all(token % 2 for token in row[1:])


@pytest.mark.parametrize("folder", golden_models("gpt2-openai"))
def test_greedy_ids_equal_those_of_openai(folder):
    import gpt2cli

    model, expected = gpt2cli.load_model(folder), np.load(folder / "expected.npz")
    prompts = [expected[f"greedy{j}_prompt"].tolist() for j in range(int(expected["n_greedy"]))]
    samples = model.generate(prompts, length=64, temperature=0, batch_size=4)
    assert len(samples) == len(prompts) >= 2
    for j, sample in enumerate(samples):
        assert sample.tokens == expected[f"greedy{j}_ids"].tolist()


@pytest.mark.parametrize("folder", golden_models("gpt2_ml"))
def test_greedy_ids_equal_those_of_gpt2_ml(folder):
    import gpt2cli

    model, expected = gpt2cli.load_model(folder), np.load(folder / "expected.npz")
    count = int(expected["n_greedy"])
    prompts = [expected[f"greedy{j}_prompt"].tolist() for j in range(count)]
    ids = [expected[f"greedy{j}_ids_noban"].tolist() for j in range(count)]
    assert count >= 2
    for prompt, tokens in zip(prompts, ids, strict=True):
        (sample,) = model.generate(prompt, length=len(tokens), temperature=0)
        assert sample.tokens == tokens and sample.finish_reason == "length"


@pytest.fixture(params=golden_models("gpt2_ml"))
def gpt2_ml(request, tmp_path):
    """A golden GPT2_ML model with its vocabulary beside it, and its results."""
    import gpt2cli

    folder = request.param
    for path in [*folder.glob("model.ckpt*"), folder / "config.json"]:
        shutil.copy(path, tmp_path / path.name)
    shutil.copy(golden_vocabulary(folder), tmp_path / "vocab.txt")
    return gpt2cli.load_model(tmp_path), np.load(folder / "expected.npz")


def test_greedy_ids_equal_those_of_gpt2_ml_when_padding_is_banned(gpt2_ml):
    """With a vocabulary, gpt2cli bans more tokens than padding; no case needs those."""
    model, expected = gpt2_ml
    assert model.encoder.end is None and 0 in model.encoder.banned
    count = int(expected["n_greedy"])
    assert count >= 2
    for j in range(count):
        prompt, ids = (expected[f"greedy{j}_{key}"].tolist() for key in ("prompt", "ids_ban0"))
        assert not {*model.encoder.banned, *range(model.encoder.n_vocab, 2**15)} & {*ids}
        (sample,) = model.generate(prompt, length=len(ids), temperature=0)
        assert sample.tokens == ids


def test_gpt2_ml_stops_as_the_original_does(gpt2_ml):
    """It stops at the first eos after which prompt and text together exceed min_len."""
    model, expected = gpt2_ml
    prompt, ids = expected["stop_prompt"].tolist(), expected["stop_ids"].tolist()
    eos, least = int(expected["stop_eos"]), int(expected["stop_min_len"]) + 1 - len(prompt)
    stop = model.encoder.decode([eos])
    settings = dict(length=60, temperature=0, stop=(stop,), min_length=least, keep_stop=True)
    (sample,) = model.generate(prompt, **settings)
    assert prompt + sample.tokens == ids and sample.finish_reason == "stop"
    assert sample.text.endswith(stop) and sample.text.count(stop) == sample.tokens.count(eos) > 1


def test_a_stop_text_ends_a_row_at_the_token_that_completes_it(tiny):
    """Also in the middle of a step of many tokens; what a step adds after it does not count."""
    options = dict(length=60, seed=1, logprobs=True)
    (whole,) = tiny.generate("The import", **options)
    stop = whole.text[30:33]
    (sample,) = tiny.generate("The import", stop=(stop,), **options)
    at = whole.text.index(stop)
    assert sample.finish_reason == "stop" and sample.text == whole.text[:at]
    count = len(sample.tokens)
    assert sample.tokens == whole.tokens[:count] and sample.logprobs == whole.logprobs[:count]
    assert stop in tiny.encoder.decode(sample.tokens)
    assert stop not in tiny.encoder.decode(sample.tokens[:-1])


def test_a_step_returns_the_rows_that_grew(either):
    rules = sampling.Rules(temperature=0.0)
    short, long = Row([5], rules, 3), Row([6], rules, 9)
    batch = Generation(either, width=2)
    assert batch.is_empty() and batch.step() == []
    batch.add([long])
    assert batch.step() == [long] and long.generated == 1
    batch.add([short])
    assert batch.step() == [short]  # it has to be read first
    assert batch.step(2) == [long, short] and short.finished and long.generated == 3
    assert short.continuation == short.tokens[1:] and len(short.continuation) == 3
    while not batch.is_empty():
        assert batch.step() == [long]
    assert long.generated == 9 and short.generated == 3


def test_an_unknown_setting_is_rejected_with_the_nearest_name(plain_model):
    with pytest.raises(UsageError, match=r"no setting 'lenght' \(did you mean length\?\); it has "):
        plain_model.generate([5], lenght=3)
    with pytest.raises(UsageError, match="no setting 'xyzzy'; it has length, min_length, "):
        plain_model.generate([5], xyzzy=3)


def test_a_model_shows_its_name_sizes_and_precision(tiny, plain_model):
    assert repr(tiny) == "<LanguageModel tiny: 4 layers, 160 wide, 2,048 tokens, float32>"
    assert repr(plain_model) == "<LanguageModel: 2 layers, 32 wide, 97 tokens, float32>"


def test_wrong_ids_are_rejected(plain_model):
    for prompt, text in (
        ([5, 97], "token 97 is not in the model: its ids are 0 to 96"),
        ([5, 1.5], r"token ids must be whole numbers, got \[5, 1.5\]"),
        ([[]], "a prompt of token ids needs at least one id"),
        ("text", "this model folder has no vocabulary: give the prompt as token ids"),
    ):
        with pytest.raises(UserError, match=text):
            plain_model.generate(prompt, length=3)
    with pytest.raises(UserError, match="got 25 tokens; give 1 to 24"):
        plain_model.logits([1] * 25)


@pytest.mark.parametrize("setting", [{"stop": "x"}, {"truncate": "x"}, {"include_prefix": True}])
def test_settings_about_text_need_a_vocabulary(plain_model, setting):
    with pytest.raises(UserError, match=f"{next(iter(setting))}.* need a vocabulary"):
        plain_model.generate([5], length=3, **setting)


def test_a_prompt_whose_ids_are_known_is_not_encoded_again(tiny, monkeypatch):
    options = GenerateOptions(length=5, seed=1)
    ids = tiny.check_prompt("The import")
    expected = tiny.generate("The import", length=5, seed=1)
    monkeypatch.setattr(tiny.encoder, "encode", None)
    assert list(tiny.answers([(0, "The import", ids)], options)) == expected


def test_a_tiny_top_p_is_not_rounded_to_0_which_keeps_all_tokens():
    rules = [sampling.Rules(top_p=p) for p in (1e-50, 0.0, 0.9)]
    found = xla_rules.tensors_of(rules, logprobs=False, n_vocab=5).top_p
    assert found[0] > 0 and found[1] == 0 and found[2] == np.float32(0.9)
