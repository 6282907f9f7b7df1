"""A model with its vocabulary, ready for use: logits, loss, generated text.

`sample`, `interactive`, `evaluate`, the samples of `train` and the Python functions all go through
`Model`; text becomes ids and ids become text here, `sampling` knows only ids.
"""

import copy
import itertools
import json
import operator
from dataclasses import asdict, dataclass, replace
from typing import get_args

import numpy as np

from gpt2cli import (
    beams,
    checkpoint,
    encoder,
    folders,
    graph,
    lite,
    model,
    sampling,
    training,
    windows,
)
from gpt2cli.config import GenerateSettings, Precision, new_seed
from gpt2cli.engine import gpus_for
from gpt2cli.errors import UsageError, UserError

BANNER = "=" * 40  # openai/gpt-2 src/generate_unconditional_samples.py
STREAMED = 4  # tokens between two pieces of a streamed text


@dataclass(frozen=True)
class Sample:
    """One generated text.

    Args:
        index: its number among all samples of the call.
        prompt: what it goes on from: a text, a list of ids, or None.
        text: what was generated (after the prompt, with include_prefix); None without a vocabulary.
        tokens: the generated ids, without the end token; with a stop text, up to the token that
            completed it.
        finish_reason: length, stop (a stop text) or end (the end token).
        seed: with the same seed and index the same text comes again.
        logprobs: with the setting of that name, the log-probability (nats) of each of `tokens`,
            before temperature, penalty and bans.
        score: of a beam: the sum of its log-probabilities, after penalty and bans, / its number of
            tokens (with the end token) ** length_penalty.
    """

    index: int
    prompt: str | list[int] | None
    text: str | None
    tokens: list[int]
    finish_reason: str
    seed: int
    logprobs: list[float] | None = None
    score: float | None = None

    def as_json(self):
        """A JSON object: the fields, without those of settings that are off."""
        values = asdict(self)
        off = [name for name in ("logprobs", "score") if values[name] is None]
        return {name: value for name, value in values.items() if name not in off}

    def show(self, format, delimiter=None):
        """The sample as it is printed: "text", OpenAI's banner and the text, or "jsonl".

        With a delimiter, the text and then the delimiter, on a line of its own, and no banner.
        """
        if format == "jsonl":
            return json.dumps(self.as_json(), ensure_ascii=False)
        text = " ".join(map(str, self.tokens)) if self.text is None else self.text
        if delimiter is not None:
            return f"{text}\n{delimiter}"
        return f"{BANNER} SAMPLE {self.index + 1} {BANNER}\n{text}"


class Continuation:
    """The text of one row while it is generated: decodes, and finds where it stops."""

    def __init__(self, index, prompt, vocabulary, settings):
        self.index, self.prompt, self.settings = index, prompt, settings
        self.tokens, self.logprobs = [], []
        self.text = ""
        self.stopped = False
        self._given = 0
        self._stream = vocabulary.stream() if vocabulary else None

    def _ends(self, always=False):
        """The texts that end it now; --stop waits for --min_length, --truncate does not."""
        enough = always or len(self.tokens) >= self.settings.min_length
        truncate = (self.settings.truncate,) if self.settings.truncate else ()
        return (*(self.settings.stop if enough else ()), *truncate)

    def feed(self, tokens):
        """Add generated ids; sets `stopped` where a stop text is complete."""
        for token in tokens:
            if self.stopped:
                return
            self.tokens.append(token)
            if self._stream:
                self._add(self._stream.feed([token]))

    def branch(self, token, logprob):
        """Another Continuation: this one with a token more, and that token's log-probability."""
        twin = copy.copy(self)
        twin.tokens, twin.logprobs = self.tokens.copy(), [*self.logprobs, logprob]
        twin._stream = copy.copy(self._stream)
        twin.feed([token])
        return twin

    def finish(self):
        """No more ids will come: give out what a half character held back."""
        if self._stream and not self.stopped:
            self._add(self._stream.finish())
        self._stream = None

    def _add(self, piece):
        before, self.text = len(self.text), self.text + piece
        found = []
        for end in self._ends():
            # It may have begun in the text before, but ends in this piece.
            at = self.text.find(end, max(0, before - len(end) + 1))
            keep = self.settings.keep_stop and end != self.settings.truncate
            if at >= 0:
                found.append((at, at + len(end) * keep))
        if found:
            self.text = self.text[: min(found)[1]]
            self.stopped = True

    def fresh(self, finished):
        """Text that was not given out before; what may be the start of a stop text waits."""
        ends = () if finished or self.stopped else self._ends(always=True)
        held = max(
            (n for end in ends for n in range(1, len(end)) if self.text.endswith(end[:n])),
            default=0,
        )
        piece = self.text[self._given : len(self.text) - held]
        self._given += len(piece)
        return piece


class Model:
    """A GPT-2 and its vocabulary. Made by `load_model`; every method may be called many times.

    Attributes:
        network: a graph.Graph or a lite.Lite.
        encoder: BPE, WordPiece, or None for a folder without a vocabulary.
        config: ModelConfig.
    """

    def __init__(self, network, vocabulary):
        self.network, self.encoder, self.config = network, vocabulary, network.config

    def logits(self, tokens):
        """Ids of one sequence, 1 to n_ctx -> float32 [T, n_vocab]: scores of what follows each."""
        tokens = self._checked(tokens)
        if not 1 <= len(tokens) <= self.config.n_ctx:
            raise UserError(f"{len(tokens)} tokens; the model reads 1 to {self.config.n_ctx}")
        return self.network.logits(tokens)

    def loss(self, tokens):
        """Ids of one text, 2 or more -> mean nats a token; see `evaluate`."""
        return self.evaluate(windows.Tokens([np.array(self._checked(tokens), np.int32)])).loss

    def evaluate(self, tokens, batch_size=1):
        """windows.Tokens -> training.Score: mean loss in nats a token, accuracy, tokens.

        The text is cut into windows of n_ctx predictions, each beginning with the last token of
        the one before: every token but the first is predicted once.
        """
        return self.score(tokens.evaluation_windows(self.config.n_ctx, batch_size))

    def score(self, batches):
        """Batches of windows.Batch -> training.Score."""
        return training.score(self.network, batches)

    def generate(self, prompts=None, **settings):
        """Continue each prompt.

        Args:
            prompts: a text, a list of ids, a list of such, or None for text from nothing.
            settings: the fields of config.GenerateSettings: length, temperature, top_k, ...

        Returns:
            A list of Sample: all samples of the first prompt, of the second, ...
        """
        try:
            settings = GenerateSettings(**settings)
        except TypeError as error:
            raise UsageError(str(error).removeprefix("GenerateSettings.__init__() ")) from None
        if settings.nsamples == 0:
            raise UsageError("nsamples must be at least 1 here; `samples` goes on for ever with 0")
        one = prompts is None or isinstance(prompts, str)
        prompts = prompts if one else list(prompts)
        if one or (len(prompts) and isinstance(prompts[0], int | np.integer)):
            prompts = [prompts]
        plain = [p if p is None or isinstance(p, str) else self._checked(p) for p in prompts]
        return list(self.samples(plain, settings))

    def samples(self, prompts, settings, first_index=0, stop=lambda: False):
        """Yield the Samples of GenerateSettings for a list of prompts, batch by batch.

        `stop` is asked between two parts of a batch; if it says so, nothing more comes.
        """
        if settings.beams > 1:
            step = settings.nsamples
            jobs = ((first_index + i * step, prompt) for i, prompt in enumerate(prompts))
        elif settings.nsamples:
            repeated = (prompt for prompt in prompts for _ in range(settings.nsamples))
            jobs = enumerate(repeated, first_index)
        else:
            jobs = enumerate(itertools.cycle(prompts), first_index)
        return self.answers(jobs, settings, stop)

    def answers(self, jobs, settings, stop=lambda: False, width=0):
        """As `samples`, for (index, prompt) of each sample; of each prompt's first, with beams.

        Args:
            width: rows to compute in any case, where another number would take compiling.
        """
        seed, jobs = new_seed() if settings.seed is None else settings.seed, iter(jobs)
        if settings.beams > 1:
            for row, score in self._beams(jobs, settings, stop):
                yield self._sample(row, settings, seed, score)
            return
        while batch := list(itertools.islice(jobs, settings.batch_size)):
            width = (width or len(batch)) if self.network.needs_full_batches else 0
            growing = self._continue(batch, settings, seed, sampling.CHUNK, width or len(batch))
            for rows, finished in growing:
                if stop():
                    return
                if finished:
                    yield from (self._sample(row, settings, seed) for row in rows)

    def stream(self, prompt, settings, index=0):
        """Yield the text of one sample in pieces, as it is generated, and last the Sample.

        With beams nothing is certain before the end: then the best comes, in one piece.
        """
        seed = new_seed() if settings.seed is None else settings.seed
        if settings.beams > 1:
            ((row, score),) = self._beams([(index, prompt)], replace(settings, nsamples=1))
            yield row.fresh(finished=True)
            yield self._sample(row, settings, seed, score)
            return
        for (row,), finished in self._continue([(index, prompt)], settings, seed, STREAMED, 1):
            yield row.fresh(finished)
        yield self._sample(row, settings, seed)

    def check_prompt(self, prompt):
        """Refuse (UserError) a prompt that cannot be continued; returns its ids."""
        if prompt is not None and not isinstance(prompt, str):
            ids = self._checked(prompt)
            if not ids:
                raise UserError("a prompt of token ids must hold at least one")
            return ids
        if self.encoder is None:
            raise UserError(
                "this model folder has no vocabulary: give the prompt as token ids, with "
                '--prompts FILE.jsonl and lines such as {"tokens": [464, 2068]}'
            )
        ids = self.encoder.prefix + self.encoder.encode(prompt or "")
        if not ids and self.encoder.start is None:
            raise UserError("this model has no start token: give it a prompt to continue")
        return self._checked(ids or [self.encoder.start])

    def length_of(self, settings, prompt):
        """The tokens to generate: --length, or n_ctx, or half of that after a prompt."""
        return settings.length or (self.config.n_ctx // 2 if prompt else self.config.n_ctx) or 1

    def _checked(self, tokens):
        try:
            tokens = [operator.index(token) for token in tokens]
        except TypeError:
            raise UserError(f"token ids are whole numbers, not {tokens!r:.80}") from None
        wrong = next((t for t in tokens if not 0 <= t < self.config.n_vocab), None)
        if wrong is not None:
            raise UserError(
                f"token {wrong} is not in the model, whose n_vocab is {self.config.n_vocab}"
            )
        return tokens

    def _continue(self, batch, settings, seed, limit, width):
        """Generate a batch of (index, prompt); yields (Continuations, all finished) as they grow.

        Rows are filled up to `width`.
        """
        ids = [self.check_prompt(prompt) for _, prompt in batch]
        rows = [Continuation(i, prompt, self.encoder, settings) for i, prompt in batch]
        spare = width - len(batch)
        generation = self._generation(
            ids + [[0]] * spare,
            settings,
            max(self.length_of(settings, prompt) for _, prompt in batch),
            seed,
            [row.index for row in rows] + [None] * spare,
        )
        while not generation.finished.all():
            for number, tokens in enumerate(generation.step(limit)[: len(rows)]):
                row, most = rows[number], self.length_of(settings, rows[number].prompt)
                row.feed(tokens[: most - len(row.tokens)])
                row.logprobs = generation.logprobs[number][: len(row.tokens)]
                if row.stopped or len(row.tokens) >= most:
                    generation.finish(number)
                if generation.finished[number]:
                    row.finish()
            yield rows, bool(generation.finished.all())

    def _beams(self, jobs, settings, stop=lambda: False):
        """Yield the nsamples likeliest Continuations of each prompt, with their scores."""
        for index, prompt in jobs:
            ids, length = self.check_prompt(prompt), self.length_of(settings, prompt)
            row = Continuation(index, prompt, self.encoder, settings)
            generation = self._generation([ids], settings, length, 0, [index])
            search = beams.Search(generation, row, settings)
            while not search.finished:
                if stop():
                    return
                search.step()
            for place, (score, row) in enumerate(search.kept[: settings.nsamples]):
                row.finish()
                row.index = index + place
                yield row, score

    def _generation(self, ids, settings, length, seed, indices):
        """The sampling.Generation of rows of ids, with this model's end and banned tokens."""
        if self.encoder is None and (settings.stop or settings.truncate):
            raise UserError("--stop and --truncate need a vocabulary; this model folder has none")
        unknown = range(self.encoder.n_vocab, self.config.n_vocab) if self.encoder else ()
        return sampling.Generation(
            self.network,
            ids,
            settings,
            length=length,
            seed=seed,
            indices=indices,
            end=self.encoder.end if self.encoder else None,
            banned=[*self.encoder.banned, *unknown] if self.encoder else [],
        )

    def _sample(self, row, settings, seed, score=None):
        if row.stopped:
            reason = "stop"
        else:
            full = len(row.tokens) >= self.length_of(settings, row.prompt)
            reason = "length" if full else "end"
        text = row.text if self.encoder else None
        if settings.include_prefix and self.encoder:
            prompt = row.prompt or ""
            text = (prompt if isinstance(prompt, str) else self.encoder.decode(prompt)) + text
        logprobs = row.logprobs if settings.logprobs else None
        return Sample(row.index, row.prompt, text, row.tokens, reason, seed, logprobs, score)


def load_model(path, precision="auto"):
    """The Model of a model folder, a run folder, or a checkpoint's path without its ending.

    Args:
        path: the folder or prefix; a folder without a vocabulary loads, for ids only.
        precision: "float32", or "auto", which is the same; "bfloat16", of weights and activations;
            "int8", of matrices, on the CPU.

    Raises:
        UserError: says which file is wrong and what to do.
    """
    if precision not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise UsageError(f"precision must be one of {known}, got {precision!r}")
    prefix = folders.find_checkpoint(path)
    encoder.of_model(prefix.parent)  # what is wrong with it is known before gigabytes are read
    config, stored = checkpoint.open_weights(prefix)
    precision = "float32" if precision == "auto" else precision
    if gpus_for(precision):
        network = graph.Graph(model.GPT2(config, stored, precision))
    else:
        network = lite.Lite(config, stored, precision)
    return Model(network, encoder.of_model(prefix.parent, config.n_vocab))
