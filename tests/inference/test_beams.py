"""Beam search against transformers' results, against plain lists, and through the commands."""

import json

import numpy as np
import oracle
import pytest
from conftest import TINY, compiled, golden_models, lively

from gpt2cli.errors import UsageError
from gpt2cli.inference.beams import Search
from gpt2cli.inference.generator import LanguageModel, load_model
from gpt2cli.inference.rows import Generation, Row
from gpt2cli.inference.sampling import Rules
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.options import GenerateOptions


def search(model, prompt, ends=(), banned=(), **settings):
    """The search's result as (score, generated ids without the end token), best first."""
    options = GenerateOptions(**settings)
    rules = Rules(
        repetition_penalty=options.repetition_penalty,
        min_length=options.min_length,
        no_repeat_ngram=options.no_repeat_ngram,
        ends=tuple(ends),
        banned=banned,
    )
    row = Row(prompt, rules, options.length, window=options.window)
    found = Search(Generation(model.network, [row]), options)
    while not found.finished:
        found.step()
    return [(score, row.continuation) for score, row in found.kept]


@pytest.mark.parametrize("folder", golden_models("gpt2-openai"))
def test_beams_equal_those_of_transformers(folder):
    model = load_model(folder)
    expected = np.load(folder / "expected.npz")
    count = int(expected["n_beam"])
    assert count >= 2
    for j in range(count):
        case = {key: expected[f"beam{j}_{key}"] for key in ("prompt", "ids", "lengths", "scores")}
        end = int(expected[f"beam{j}_eos"])
        found = search(
            model,
            case["prompt"].tolist(),
            ends=[] if end < 0 else [end],
            beams=int(expected[f"beam{j}_num_beams"]),
            length=int(expected[f"beam{j}_max_new_tokens"]),
            length_penalty=float(expected[f"beam{j}_length_penalty"]),
        )
        assert len(found) >= 3
        for place, (score, tokens) in enumerate(found[:3]):
            theirs = [token for token in case["ids"][place].tolist() if token >= 0]
            assert tokens == (theirs[:-1] if theirs[-1] == end else theirs)
            assert len(theirs) == case["lengths"][place]
            assert score == pytest.approx(float(case["scores"][place]), abs=1e-3)


@pytest.fixture(scope="module")
def small():
    """Seven tokens, a window of eight; random, lively weights."""
    return LanguageModel(compiled("lite", lively(ModelConfig(7, 8, 16, 2, 2), seed=5)), None)


def after(model, window="half"):
    """The model as a function of a row; its window as the docstring of `sampling` says."""

    def log_probs(row, begin=0):
        if window == "last":
            row = row if len(row) < 8 else row[-7:]
        else:
            row = row[begin:]
        return oracle.log_softmax(model.logits(row)[-1])

    return log_probs


def same(found, expected, ends=()):
    """Compare with the oracle's result, whose texts have their end tokens."""
    cut = [tokens[:-1] if tokens[-1] in ends else tokens for _, tokens in expected]
    assert [tokens for _, tokens in found] == cut
    assert [s for s, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -1.0])
def test_with_beams_enough_the_likeliest_of_all_texts_are_found(small, penalty):
    everything = []
    for text in np.ndindex(7, 7, 7):
        scores = [small.logits([1, 2, *text[:i]])[-1] for i in range(3)]
        total = sum(oracle.log_softmax(s)[t] for s, t in zip(scores, text, strict=True))
        everything.append((total / 3**penalty, list(text)))
    everything.sort(key=lambda item: -item[0])
    found = search(small, [1, 2], beams=343, length=3, length_penalty=penalty)
    same(found, everything)


@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize("penalty", [0.0, 2.5])
def test_beams_that_end_are_kept_while_others_run_on(small, size, penalty):
    for ends in (*((end,) for end in range(7)), (0, 3), (5, 1, 2), (6, 5, 4, 3)):
        settings = dict(beams=size, length=6)
        found = search(small, [1, 2], ends, length_penalty=penalty, **settings)
        expected = oracle.beam_search(after(small), [1, 2], *settings.values(), penalty, ends)
        same(found, expected, ends)
        assert len(found) == size


def test_the_rules_change_the_log_probabilities_as_in_transformers(small):
    """Penalty on log-probabilities, not logits; bans are not made up for."""
    ends, least = (3, 6), 4

    def change(row, scores):
        scores = scores.copy()
        scores[list(set(row))] *= 1.3  # they are below 0
        scores[[0, *oracle.repeats(row, 2)]] = -np.inf
        if len(row) - 2 < least:
            scores[list(ends)] = -np.inf
        return scores

    settings = dict(beams=4, length=6)
    expected = oracle.beam_search(
        after(small), [1, 2], *settings.values(), ends=ends, change=change
    )
    rules = dict(repetition_penalty=1.3, no_repeat_ngram=2, min_length=least)
    same(search(small, [1, 2], ends, [0], **rules, **settings), expected, ends)
    assert any(tokens[-1] in ends for _, tokens in expected)


def test_past_the_window_beams_read_again(small):
    """The window moves by the row's length alone, so the same way for every beam."""

    def half(row):
        begin = max(0, 10 - 8)  # of the prompt of 10
        for length in range(11, len(row) + 1):
            begin = length - 4 if length - begin > 8 else begin
        return after(small)(row, begin)

    prompt = [1, 2, 3, 4, 5, 6, 0, 1, 2, 3]
    settings = dict(beams=3, length=14)
    for window, rule in (("half", half), ("last", after(small, "last"))):
        expected = oracle.beam_search(rule, prompt, *settings.values())
        same(search(small, prompt, window=window, **settings), expected)


def test_the_samples_of_beams_come_best_first_with_score_and_logprobs(plain_model):
    settings = dict(beams=4, nsamples=3, length=9, length_penalty=0.5, logprobs=True)
    samples = plain_model.generate([[5, 6], [7]], **settings)
    assert [s.index for s in samples] == list(range(6))
    assert [s.prompt for s in samples] == [[5, 6]] * 3 + [[7]] * 3
    for sample in samples:
        assert len(sample.tokens) == 9 and sample.finish_reason == "length"
        logits = plain_model.logits(sample.prompt + sample.tokens[:-1])[-9:]
        expected = oracle.log_softmax(logits)[range(9), sample.tokens]
        assert sample.logprobs == pytest.approx(expected, abs=1e-4)
        assert sample.score == pytest.approx(sum(sample.logprobs) / 3, abs=1e-4)
    scores = [s.score for s in samples]
    assert scores[:3] == sorted(scores[:3])[::-1] and scores[3:] == sorted(scores[3:])[::-1]


def test_a_stop_text_completes_a_beam(tiny):
    settings = dict(beams=3, nsamples=3, length=12, min_length=4)
    ids = tiny.encoder.encode("def f")

    def stops(tokens):
        """The last token completes it, and there are enough."""
        before, text = (tiny.encoder.decode(t).count("\n") for t in (tokens[:-1], tokens))
        return text > before and len(tokens) >= 4

    for keep in (False, True):
        samples = tiny.generate("def f", stop=("\n",), keep_stop=keep, **settings)
        expected = oracle.beam_search(
            *(lambda row: oracle.log_softmax(tiny.logits(row)[-1]), ids, 3, 12),
            ends=tiny.encoder.ends,
            change=lambda row, scores: np.where(
                (np.arange(len(scores)) == tiny.encoder.end) & (len(row) < len(ids) + 4),
                *(-np.inf, scores),
            ),
            stops=stops,
        )
        assert [s.tokens for s in samples] == [tokens for _, tokens in expected]
        for sample in samples:
            whole = tiny.encoder.decode(sample.tokens)
            before = len(tiny.encoder.decode(sample.tokens[:-1]))
            at = whole.index("\n", before) if sample.finish_reason == "stop" else len(whole)
            assert sample.text == whole[: at + keep]
        assert "stop" in {s.finish_reason for s in samples}


def test_beams_through_the_commands(cli, tiny):
    flags = ("--model_name", "tiny", "--models_dir", TINY.parent, "--prompt", "import ")
    flags += ("--length", 10, "--beams", 3, "--nsamples", 2)
    samples = tiny.generate("import ", length=10, beams=3, nsamples=2)
    result = cli("sample", *flags, "--format", "jsonl", "--batch_size", 2)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(s["tokens"], s["score"]) for s in found] == [(s.tokens, s.score) for s in samples]
    assert "logprobs" not in found[0]
    shown = cli("sample", *flags, "--include_prefix").stdout
    assert all(f"import {s.text}\n" in shown for s in samples)
    settings = GenerateOptions(length=10, beams=3, nsamples=2, include_prefix=True)
    *pieces, best = tiny.stream("import ", settings)
    assert "".join(pieces) == samples[0].text and best.text == "import " + samples[0].text


def test_an_interactive_session_prints_all_beams(cli, tiny, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("import \n"))
    flags = ("--model_name", "tiny", "--models_dir", TINY.parent, "--include_prefix")
    result = cli("interactive", *flags, "--length", 10, "--beams", 3, "--nsamples", 2)
    samples = tiny.generate("import ", length=10, beams=3, nsamples=2)
    assert len(samples) == 2
    for sample in samples:
        assert f"{sample.index + 1} {'=' * 40}\nimport {sample.text}\n" in result.stdout


def test_beams_do_not_draw():
    for wrong in (dict(nsamples=4), dict(temperature=0.5), dict(top_k=3), dict(top_p=0.5)):
        with pytest.raises(UsageError, match="beams"):
            GenerateOptions(beams=3, **wrong)
