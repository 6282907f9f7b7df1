"""A model with its vocabulary, ready for use: logits, loss, generated text.

`sample`, `interactive`, `evaluate`, the samples of `train` and the Python functions all go through
`LanguageModel`; text becomes ids and ids become text here, `sampling` knows only ids.
"""

import itertools
import operator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np

from gpt2cli.errors import UsageError, UserError
from gpt2cli.inference import beams, sampling
from gpt2cli.inference import rows as generation
from gpt2cli.inference.engines import litert as lite
from gpt2cli.inference.engines import xla as graph
from gpt2cli.inference.score import score as score_batches
from gpt2cli.inference.text import Continuation, Sample
from gpt2cli.model import network as model
from gpt2cli.options import GenerateOptions, Precision, new_seed
from gpt2cli.storage import checkpoint, folders
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.tensorflow import gpus_for
from gpt2cli.text import batches as windows
from gpt2cli.text import encoder
from gpt2cli.text.encoder import Encoder

STREAMED = 4  # tokens between two pieces of a streamed text


class LanguageModel:
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

    def logprobs(self, tokens):
        """How likely each of up to n_ctx ids was: (nats, {id: nats} of the likeliest) of each.

        Of the first, which nothing goes before, None and {}.
        """
        tokens, found = self._checked(tokens), [(None, {})]
        for logits, token in zip(self.logits(tokens), tokens[1:], strict=False):
            own = sampling.log_softmax(logits)
            best = sampling.likeliest(own, sampling.LIKELIEST)
            found.append(
                (float(own[token]), dict(zip(best.tolist(), own[best].tolist(), strict=True)))
            )
        return found

    def evaluate(self, tokens, batch_size=1):
        """batches.Tokens -> Score: mean loss in nats a token, accuracy, tokens.

        The text is cut into windows of n_ctx predictions, each beginning with the last token of
        the one before: every token but the first is predicted once.
        """
        return self.score(tokens.evaluation_windows(self.config.n_ctx, batch_size))

    def score(self, batches):
        """Batches -> Score."""
        return score_batches(self.network, batches)

    def generate(self, prompts=None, **settings):
        """Continue each prompt.

        Args:
            prompts: a text, a list of ids, a list of such, or None for text from nothing.
            settings: the fields of GenerateOptions: length, temperature, top_k, ...

        Returns:
            A list of Sample: all samples of the first prompt, of the second, ...
        """
        try:
            settings = GenerateOptions(**settings)
        except TypeError as error:
            raise UsageError(str(error).removeprefix("GenerateOptions.__init__() ")) from None
        if settings.nsamples == 0:
            raise UsageError("nsamples must be at least 1 here; `samples` goes on for ever with 0")
        one = prompts is None or isinstance(prompts, str)
        prompts = prompts if one else list(prompts)
        if one or (len(prompts) and isinstance(prompts[0], int | np.integer)):
            prompts = [prompts]
        plain = [p if p is None or isinstance(p, str) else self._checked(p) for p in prompts]
        return list(self.samples(plain, settings))

    def samples(self, prompts, settings, first_index=0, stop=lambda: False):
        """Yield the Samples of GenerateOptions for a list of prompts, batch by batch.

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
                yield self.sample(row, seed, score)
            return
        while batch := list(itertools.islice(jobs, settings.batch_size)):
            width = width or len(batch)
            for rows, finished in self._continue(batch, settings, seed, sampling.CHUNK, width):
                if stop():
                    return
                if finished:
                    yield from (self.sample(row, seed) for row in rows)

    def stream(self, prompt, settings, index=0):
        """Yield the text of one sample in pieces, as it is generated, and last the Sample.

        With beams nothing is certain before the end: then the best comes, in one piece.
        """
        seed = new_seed() if settings.seed is None else settings.seed
        if settings.beams > 1:
            ((row, score),) = self._beams([(index, prompt)], replace(settings, nsamples=1))
            yield row.fresh(finished=True)
            yield self.sample(row, seed, score)
            return
        for (row,), finished in self._continue([(index, prompt)], settings, seed, STREAMED, 1):
            yield row.fresh(finished)
        yield self.sample(row, seed)

    def warm(self, width=1):
        """Compile, and run once, what a Batch of up to so many rows needs."""
        compiles = self.network.needs_full_batches
        sizes = graph.cache_sizes(self.config.n_ctx) if compiles else [graph.SMALLEST_CACHE]
        cases = itertools.product(sizes, [width] if compiles else [1, width], [0, 2])
        for slots, rows, ngram in cases:
            prompt = [0] * max(1, slots - 2)
            settings = GenerateOptions(length=2, no_repeat_ngram=ngram)
            batch = Batch(self.network, width)
            batch.add([self.begin(number, prompt, settings, 0) for number in range(rows)])
            while not batch.is_empty():
                batch.step()

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

    def begin(self, index, prompt, settings, seed, ids=None):
        """The Continuation of a prompt, for a Batch; refuses (UserError) as `check_prompt`.

        Args:
            ids: what `check_prompt` gave for the prompt, if that was asked before.
        """
        ids = self.check_prompt(prompt) if ids is None else ids
        if self.encoder is None and (settings.stop or settings.truncate):
            raise UserError("--stop and --truncate need a vocabulary; this model folder has none")
        length = self.length_of(settings, prompt)
        row = generation.Row(
            *(ids, self._rules(settings), length, seed, index, settings.window, settings.logprobs)
        )
        return Continuation(index, prompt, self.encoder, settings, row)

    def sample(self, text, seed, score=None):
        """The Sample that a finished Continuation is."""
        settings, prompt = text.settings, text.prompt or ""
        full = len(text.tokens) >= self.length_of(settings, text.prompt)
        reason = "stop" if text.stopped else "length" if full else "end"
        shown = text.text if self.encoder else None
        if settings.include_prefix and self.encoder:
            shown = (prompt if isinstance(prompt, str) else self.encoder.decode(prompt)) + shown
        logprobs = text.logprobs if settings.logprobs else None
        return Sample(text.index, text.prompt, shown, text.tokens, reason, seed, logprobs, score)

    def _continue(self, batch, settings, seed, limit, width):
        """Generate a batch of (index, prompt); yields (Continuations, all finished) as they grow.

        Args:
            width: rows to compute at the least, where another number would take compiling.
        """
        texts = [self.begin(index, prompt, settings, seed) for index, prompt in batch]
        growing = Batch(self.network, width)
        growing.add(texts)
        finished = False
        while not finished:
            growing.step(limit)
            finished = growing.is_empty()
            yield texts, finished

    def _beams(self, jobs, settings, stop=lambda: False):
        """Yield the nsamples likeliest Continuations of each prompt, with their scores."""
        for index, prompt in jobs:
            text = self.begin(index, prompt, settings, 0)
            search = beams.Search(generation.Generation(self.network, [text.row]), text, settings)
            while not search.finished:
                if stop():
                    return
                search.step()
            for place, (score, row) in enumerate(search.kept[: settings.nsamples]):
                row.finish()
                row.index = index + place
                yield row, score

    def _rules(self, settings):
        """The sampling.Rules of settings, with this model's end and banned tokens."""
        end, banned = None, []
        if self.encoder:
            unknown = range(self.encoder.n_vocab, self.config.n_vocab)
            end, banned = self.encoder.end, [*self.encoder.banned, *unknown]
        return sampling.Rules(
            **{name: getattr(settings, name) for name in sampling.Rules._fields[:6]},
            end=-1 if end is None else end,
            banned=tuple(token for token in banned if token < self.config.n_vocab),
        )


class Batch:
    """Continuations that grow side by side: the loop of all that generates but beams.

    Args:
        network, width: as of generation.Generation.
    """

    def __init__(self, network, width=0):
        self._generation = generation.Generation(network, width=width)
        self._texts = {}  # generation.Row -> Continuation

    def add(self, texts):
        """Let Continuations join, between two steps."""
        self._texts |= {text.row: text for text in texts}
        self._generation.add([text.row for text in texts])

    def step(self, limit=sampling.CHUNK):
        """Up to `limit` tokens more; returns the Continuations that were worked on."""
        grown = []
        for row, tokens in self._generation.step(limit):
            text = self._texts[row]
            text.grow(tokens)
            grown.append(text)
        self._texts = {row: text for row, text in self._texts.items() if not row.finished}
        return grown

    def is_empty(self):
        """Whether all have finished."""
        return not self._texts


def load_model(
    path: str | Path | ModelFolder, precision: str = "auto", vocabulary: Encoder | None = None
) -> LanguageModel:
    """Load a model folder, a run folder, or a checkpoint's path without its extension.

    Args:
        path: the folder or prefix; a folder without a vocabulary loads, for ids only.
        precision: "float32", or "auto", which is the same; "bfloat16", for weights and activations;
            "int8", for matrices, on the CPU.
        vocabulary: the folder's vocabulary, where it was loaded before.

    Raises:
        UserError: the text names the damaged or missing file, and what to do.
    """
    if precision not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise UsageError(f"precision must be one of {known}, got {precision!r}")
    folder = path if isinstance(path, ModelFolder) else folders.open_model(path)
    if vocabulary is None:
        vocabulary = encoder.of_model(folder)  # before gigabytes are read
    sizes, stored = checkpoint.open_weights(folder)
    if vocabulary is not None:
        encoder.check_fits(folder, vocabulary, sizes.n_vocab)
    precision = "float32" if precision == "auto" else precision
    if gpus_for(precision):
        network = graph.Graph(model.GPT2(sizes, stored, precision))
    else:
        network = lite.Lite(sizes, stored, precision)
    return LanguageModel(network, vocabulary)
