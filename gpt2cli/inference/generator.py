"""A model with its vocabulary, ready for use: logits, loss, generated text.

`sample`, `interactive`, `evaluate`, `serve`, the samples of `train` and the Python functions all
use `LanguageModel`. Here text becomes ids and ids become text; `sampling` knows only ids.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from gpt2cli import peers
from gpt2cli.console import counted
from gpt2cli.errors import UsageError, UserError, names_without_dashes
from gpt2cli.inference import devices, sampling
from gpt2cli.inference.beams import Search
from gpt2cli.inference.engines.engine import Engine
from gpt2cli.inference.rows import Generation, Row, most_seen
from gpt2cli.inference.score import Score, score
from gpt2cli.inference.text import Prompt, RowText, Sample, encode_prompt
from gpt2cli.options import GenerateOptions, GeneratorOptions, Precision, new_seed
from gpt2cli.storage import folders, reading
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.text import encoder
from gpt2cli.text.batches import Batch, Tokens
from gpt2cli.text.encoder import Encoder

STREAMED = 4  # tokens between two pieces of a streamed text

Job = tuple[int, Prompt, list[int] | None]  # index, prompt, and its ids if they are known


def _never() -> bool:
    return False


class LanguageModel:
    """A GPT-2 and its vocabulary. Made by `load_model`; every method may be called many times.

    Args:
        network: the engine that runs the network.
        vocabulary: None for a model folder without one; then prompts are token ids.
        name: the folder's, for `repr`.
        precision: of the weights, for `repr`.

    Attributes:
        network: as above.
        encoder: BPE, WordPiece, or None.
        config: the sizes.
    """

    def __init__(
        self,
        network: Engine,
        vocabulary: Encoder | None,
        name: str = "",
        precision: str = "float32",
    ) -> None:
        self.network, self.encoder, self.config = network, vocabulary, network.config
        self._name, self._precision = name, precision

    def __repr__(self) -> str:
        """Return name, sizes and precision."""
        sizes = self.config
        name = f" {self._name}" if self._name else ""
        return (
            f"<LanguageModel{name}: {counted(sizes.n_layer, 'layer')}, {sizes.n_embd} wide, "
            f"{counted(sizes.n_vocab, 'token')}, {self._precision}>"
        )

    def logits(self, tokens: Iterable[int]) -> np.ndarray:
        """Return the scores of every possible next token, after each token of a text.

        Args:
            tokens: ids of one text, 1 to n_ctx.

        Returns:
            float32 [T, n_vocab].

        Raises:
            UserError: an id is not in the model, or there are too many ids or none.
        """
        ids = self._checked(tokens)
        if not 1 <= len(ids) <= self.config.n_ctx:
            raise UserError(f"got {counted(len(ids), 'token')}; give 1 to {self.config.n_ctx}")
        return self.network.logits(ids)

    def loss(self, tokens: Iterable[int]) -> float:
        """Return the mean loss in nats per token of one text; see `evaluate`.

        Args:
            tokens: ids, 2 or more.

        Raises:
            UserError: an id is not in the model, or there are fewer than 2.
        """
        return self.evaluate(Tokens([np.array(self._checked(tokens), np.int32)])).loss

    def logprobs(self, tokens: Iterable[int]) -> list[tuple[float | None, dict[int, float]]]:
        """Return how likely each token of a text is, and the likeliest ones in its place.

        Args:
            tokens: ids of one text, 1 to n_ctx.

        Returns:
            For each id its log-probability and {id: log-probability} of the likeliest, in nats; for
            the first id, which follows nothing, None and {}.
        """
        ids = self._checked(tokens)
        found: list[tuple[float | None, dict[int, float]]] = [(None, {})]
        for logits, token in zip(self.logits(ids), ids[1:], strict=False):
            own = sampling.log_softmax(logits)
            best = sampling.likeliest(own, sampling.LIKELIEST)
            likeliest = dict(zip(best.tolist(), own[best].tolist(), strict=True))
            found.append((float(own[token]), likeliest))
        return found

    def evaluate(self, tokens: Tokens, batch_size: int = 1) -> Score:
        """Return mean loss in nats per token, accuracy and number of tokens of a corpus.

        The text is cut into windows of n_ctx predictions. Each window begins with the last token of
        the one before it, so every token but the first is predicted once.

        Args:
            tokens: the corpus.
            batch_size: number of windows to read at once.
        """
        return self.score(tokens.evaluation_windows(self.config.n_ctx, batch_size))

    def score(self, batches: Iterable[Batch]) -> Score:
        """Return how well the model predicts all batches together."""
        return score(self.network, batches)

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str | Sequence[int]] | None = None,
        **settings: Any,
    ) -> list[Sample]:
        """Continue each prompt.

            model.generate("The import statement", length=40, seed=1)[0].text
            model.generate([[464, 2068], [50256]], nsamples=3, temperature=0.7)

        Args:
            prompts: a text, the token ids of one prompt, a list of several texts or lists of ids,
                or None for text from nothing.
            settings: the fields of GenerateOptions, such as length, temperature, top_k, nsamples.

        Returns:
            All samples of the first prompt, then of the second, ...

        Raises:
            UsageError: an unknown setting, or a value out of range.
            UserError: a prompt cannot be continued.
        """
        with names_without_dashes():
            options = _generate_options(settings)
        if options.nsamples == 0:
            raise UsageError("nsamples must be at least 1 here; only `samples` can run without end")
        several: Any = [prompts]
        if prompts is not None and not isinstance(prompts, str):
            is_one = len(prompts) > 0 and isinstance(prompts[0], int | np.integer)
            several = [prompts] if is_one else prompts
        plain = [p if p is None or isinstance(p, str) else self._checked(p) for p in several]
        return list(self.samples(plain, options))

    def samples(
        self,
        prompts: Sequence[Prompt],
        options: GenerateOptions,
        first_index: int = 0,
        stop: Callable[[], object] = _never,
    ) -> Iterator[Sample]:
        """Yield the samples of each prompt, batch by batch; without end if nsamples is 0.

        Args:
            prompts: what to continue.
            options: how.
            first_index: index of the first sample.
            stop: is called between two parts of a batch; if its result is true, no samples follow.
        """
        numbered: Iterable[tuple[int, Prompt]]
        if options.beams > 1:
            numbered = zip(itertools.count(first_index, options.nsamples), prompts)
        elif options.nsamples:
            repeated = (prompt for prompt in prompts for _ in range(options.nsamples))
            numbered = enumerate(repeated, first_index)
        else:
            numbered = enumerate(itertools.cycle(prompts), first_index)
        return self.answers(((index, prompt, None) for index, prompt in numbered), options, stop)

    def answers(
        self,
        jobs: Iterable[Job],
        options: GenerateOptions,
        stop: Callable[[], object] = _never,
        width: int = 0,
    ) -> Iterator[Sample]:
        """Yield samples as `samples` does, for prompts with an index.

        Args:
            jobs: (index, prompt, ids) of each sample, or with beams of each prompt's first. The ids
                are the result of `check_prompt`, or None to encode the prompt here.
            options: how to continue them; nsamples counts only with beams.
            stop: as in `samples`.
            width: least number of rows to compute, where another number would cost a compilation.
        """
        seed = new_seed() if options.seed is None else options.seed
        jobs = iter(jobs)
        if options.beams > 1:
            for row, found in self._beams(jobs, options, stop):
                yield self.sample(row, seed, found)
            return
        while batch := list(itertools.islice(jobs, options.batch_size)):
            width = width or len(batch)
            rows = [self.begin(*job[:2], options, seed, job[2]) for job in batch]
            for _ in self._grow(rows, sampling.CHUNK, width):
                if stop():
                    return
            yield from (self.sample(row, seed) for row in rows)

    def stream(
        self, prompt: Prompt, options: GenerateOptions, index: int = 0
    ) -> Iterator[str | Sample]:
        """Yield the text of one sample in pieces, as it is generated, and last the Sample.

        nsamples and batch_size do not count. With beams nothing is certain before the end, so the
        best beam comes in one piece.
        """
        seed = new_seed() if options.seed is None else options.seed
        if options.beams > 1:
            one = dataclasses.replace(options, nsamples=1)
            ((row, found),) = self._beams([(index, prompt, None)], one)
            yield row.text.fresh(finished=True)
            yield self.sample(row, seed, found)
            return
        row = self.begin(index, prompt, options, seed)
        for _ in self._grow([row], STREAMED, width=1):
            yield row.text.fresh(row.finished)
        yield self.sample(row, seed)

    def warm(self, width: int = 1) -> None:
        """Compile, and run once, everything that up to `width` rows side by side need."""
        compiles = self.network.needs_full_batches
        numbers = [width] if compiles else [1, width]
        for slots, number, ngram in itertools.product(self.network.cache_sizes, numbers, [0, 2]):
            prompt = [0] * max(1, slots - 2)
            options = GenerateOptions(length=2, no_repeat_ngram=ngram)
            rows = [self.begin(index, prompt, options, seed=0) for index in range(number)]
            for _ in self._grow(rows, sampling.CHUNK, width):
                pass

    @functools.cached_property
    def longest_token(self) -> int:
        """The number of bytes of the vocabulary's longest token."""
        vocabulary = self.encoder
        ids = range(vocabulary.n_vocab) if vocabulary else ()
        return max((len(vocabulary.bytes_of([token])) for token in ids if vocabulary), default=0)

    def check_prompt(self, prompt: Prompt, special: bool = False) -> list[int]:
        """Return the ids of a prompt, after those that this model puts before every text.

        Args:
            prompt: what to continue.
            special: read texts of `encoder.added` in it, such as <|endoftext|>, as these tokens.

        Raises:
            UserError: it cannot be continued.
        """
        if prompt is not None and not isinstance(prompt, str):
            ids = self._checked(prompt)
            if not ids:
                raise UserError("a prompt of token ids needs at least one id")
            return ids
        if self.encoder is None:
            raise UserError(
                "this model folder has no vocabulary: give the prompt as token ids, with "
                '--prompts FILE.jsonl and lines such as {"tokens": [464, 2068]}'
            )
        ids = encode_prompt(self.encoder, prompt or "", special)
        if not ids:
            if self.encoder.start is None:
                raise UserError("this model has no start token: give it a prompt to continue")
            ids = [self.encoder.start]
        return self._checked(ids)

    def begin(
        self,
        index: int,
        prompt: Prompt,
        options: GenerateOptions,
        seed: int,
        ids: list[int] | None = None,
    ) -> Row:
        """Return the Row of a prompt, for a Generation.

        Args:
            index: the sample's number, which with the seed determines its random numbers.
            prompt: what to continue.
            options: how.
            seed: of the random numbers.
            ids: the result of `check_prompt`, if it is known: the prompt is not encoded again.

        Raises:
            UserError: as `check_prompt`; or an option needs a vocabulary and there is none.
        """
        ids = self.check_prompt(prompt, options.special == "token") if ids is None else ids
        if self.encoder is None and (options.stop or options.truncate or options.include_prefix):
            raise UserError(
                "--stop, --truncate and --include_prefix need a vocabulary; this model folder has "
                "none"
            )
        n_ctx = self.config.n_ctx
        return Row(
            ids,
            self._rules(options),
            length=options.length or (n_ctx // 2 if prompt else n_ctx) or 1,
            seed=seed,
            index=index,
            window=options.window,
            logprobs=options.logprobs,
            text=RowText(prompt, self.encoder, options),
        )

    def sample(self, row: Row, seed: int, score: float | None = None) -> Sample:
        """Return the Sample of a finished row that `begin` made."""
        text, tokens = row.text, row.continuation
        reason = "stop" if text.stopped else "length" if len(tokens) >= row.length else "end"
        shown = text.so_far
        if text.options.include_prefix and self.encoder:
            prompt = text.prompt or ""
            shown = (prompt if isinstance(prompt, str) else self.encoder.decode(prompt)) + shown
        logprobs = row.logprobs if text.options.logprobs else None
        return Sample(
            index=row.index,
            prompt=text.prompt,
            text=shown if self.encoder else None,
            tokens=tokens,
            finish_reason=reason,
            seed=seed,
            logprobs=logprobs,
            score=score,
            prompt_cut=self.prompt_cut(row),
        )

    def prompt_cut(self, row: Row) -> int:
        """Return the number of tokens at the prompt's start that the model does not see."""
        return max(0, row.prompt_length - most_seen(self.config.n_ctx, row.sees))

    def _checked(self, tokens: Iterable[int]) -> list[int]:
        """Return ids as a list of int; UserError if one is not in the model."""
        try:
            ids = [operator.index(token) for token in tokens]
        except TypeError:
            raise UserError(f"token ids must be whole numbers, got {tokens!r:.80}") from None
        wrong = next((t for t in ids if not 0 <= t < self.config.n_vocab), None)
        if wrong is not None:
            raise UserError(
                f"token {wrong} is not in the model: its ids are 0 to {self.config.n_vocab - 1}"
            )
        return ids

    def _grow(self, rows: Sequence[Row], limit: int, width: int) -> Iterator[None]:
        """Grow rows side by side to their ends; yield after each step of up to `limit` tokens."""
        generation = Generation(self.network, rows, width)
        while not generation.is_empty():
            generation.step(limit)
            yield

    def _beams(
        self, jobs: Iterable[Job], options: GenerateOptions, stop: Callable[[], object] = _never
    ) -> Iterator[tuple[Row, float]]:
        """Yield the nsamples likeliest rows of each prompt, with their scores."""
        for index, prompt, ids in jobs:
            row = self.begin(index, prompt, options, 0, ids)
            search = Search(Generation(self.network, [row]), options)
            while not search.finished:
                if stop():
                    return
                search.step()
            for place, beam in enumerate(search.kept[: options.nsamples]):
                beam.row.text.finish()
                beam.row.index = index + place
                yield beam.row, beam.score

    def _rules(self, options: GenerateOptions) -> sampling.Rules:
        """Return the options' rules, with this model's end tokens and banned tokens."""
        ends: tuple[int, ...] = ()
        banned: list[int] = []
        if self.encoder:
            unknown = range(self.encoder.n_vocab, self.config.n_vocab)
            ends, banned = self.encoder.ends, [*self.encoder.banned, *unknown]
        return sampling.Rules(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            repetition_penalty=options.repetition_penalty,
            min_length=options.min_length,
            no_repeat_ngram=options.no_repeat_ngram,
            ends=tuple(token for token in ends if token < self.config.n_vocab),
            banned=tuple(token for token in banned if token < self.config.n_vocab),
        )


def _generate_options(settings: dict[str, Any]) -> GenerateOptions:
    """Return GenerateOptions; UsageError for a name that is not one of its fields."""
    names = [field.name for field in dataclasses.fields(GenerateOptions)]
    for name in settings:
        if name not in names:
            hint = peers.for_flag(name, names)
            raise UsageError(f"generate has no setting {name!r}{hint}; it has {', '.join(names)}")
    return GenerateOptions(**settings)


def load_for(
    options: GeneratorOptions, folder: ModelFolder, vocabulary: Encoder | None = None
) -> LanguageModel:
    """Load a model as a command's options say; see `load_model`."""
    precision, lookup, room = options.precision, options.lookup, options.prefix_cache
    return load_model(folder, precision, vocabulary, lookup=lookup, prefix_cache=room)


def load_model(
    path: str | Path | ModelFolder,
    precision: str = "auto",
    vocabulary: Encoder | None = None,
    *,
    lookup: bool = True,
    prefix_cache: int = 256,
) -> LanguageModel:
    """Load a model folder, a run folder, or a checkpoint's path without its extension.

    Args:
        path: the folder or path; a folder without a vocabulary loads, for ids only.
        precision: "float32", or "auto", which is the same; "bfloat16", for weights and activations;
            "int8", for matrices, on the CPU.
        vocabulary: the folder's vocabulary, if it was loaded before.
        lookup: as in GeneratorOptions.
        prefix_cache: as in GeneratorOptions.

    Raises:
        UsageError: there is no such precision.
        UserError: a file is damaged or missing; the text names it, and what to do.
    """
    if precision not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise UsageError(f"precision must be one of {known}, got {precision!r}")
    folder = path if isinstance(path, ModelFolder) else folders.open_model(path)
    if vocabulary is None:
        vocabulary = encoder.of_model(folder)  # before gigabytes are read
    sizes, stored = reading.open_weights(folder)
    if vocabulary is not None:
        encoder.check_fits(folder, vocabulary, sizes.n_vocab)
    precision = "float32" if precision == "auto" else precision
    network: Engine
    if devices.gpus(precision):
        from gpt2cli.inference.engines.xla import XlaEngine
        from gpt2cli.model.network import GPT2

        network = XlaEngine(GPT2(sizes, stored, precision))
    else:
        from gpt2cli.inference.engines.litert import LitertEngine

        network = LitertEngine(sizes, stored, precision, lookup, prefix_cache * 2**20)
    return LanguageModel(network, vocabulary, folder.path.resolve().name, precision)
