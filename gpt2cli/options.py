"""Options that several commands share: model, text, sampling.

A command's own options stand at the top of its module in `commands/`. Each class is a frozen
dataclass whose fields are the flags, the defaults, the help (the text after a field's name in the
docstring) and the record of a run.
"""

import functools
import re
import secrets
import string
from dataclasses import dataclass
from typing import Literal

from gpt2cli.errors import UsageError
from gpt2cli.flags import check

MAX_SEED = 2**63 - 1  # a seed is one signed 64-bit word of the generator's key
MAX_TOKENS = 2**31 - 1  # token counts and ids are 32-bit numbers

Precision = Literal["auto", "float32", "bfloat16", "int8"]  # of a model that is not being trained


def check_name(flag: str, name: str) -> None:
    """Reject a model or run name that is not the name of one folder.

    Raises:
        UsageError: the name is empty or could lead to another folder.
    """
    if not name or name in (".", "..") or re.search(r"[/\\\0]", name) or name != name.strip():
        raise UsageError(
            f"--{flag} must be a single name without / or \\, got {name!r}; "
            "set its parent folder with --models_dir or --checkpoint_dir"
        )


def check_added(texts: tuple[str, ...]) -> None:
    """Reject (UsageError) texts of new tokens that are empty, blank or given twice."""
    for number, text in enumerate(texts):
        if not text.strip() or "\n" in text:
            raise UsageError(f"--add_token must be a text such as <|user|>, got {text!r}")
        if text in texts[:number]:
            raise UsageError(f"--add_token {text} is given twice")


def new_seed() -> int:
    """Draw a seed that is short enough to type again."""
    return secrets.randbelow(2**31)


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """Where models and runs are.

    Folders and messages:
        models_dir: folder that contains the model folders.
        checkpoint_dir: folder that contains the run folders.
        verbose: show TensorFlow's own messages.
    """

    models_dir: str = "models"
    checkpoint_dir: str = "checkpoint"
    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class SourceOptions(FolderOptions):
    """Which model a command reads.

    Model:
        model_name: model to use (default: 124M).
        run_name: run whose newest checkpoint to use instead of a model.
    """

    model_name: str | None = None
    run_name: str | None = None

    def _check_source(self) -> None:
        if self.model_name is not None and self.run_name is not None:
            raise UsageError("give --model_name or --run_name, not both")
        for flag in ("model_name", "run_name"):
            if getattr(self, flag) is not None:
                check_name(flag, getattr(self, flag))


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(SourceOptions):
    """Which model a command loads, which checkpoint of it, and in which number format.

    Model:
        checkpoint: checkpoint to use, as model-2000 or 2000 (default: the newest).
        precision: number format: auto is float32; bfloat16 is for GPUs (on a CPU it only rounds the
            weights); int8 always runs on the CPU, where it is fastest and needs a quarter of the
            memory.
    """

    checkpoint: str | None = None
    precision: Precision = "auto"

    def _check_source(self) -> None:
        super()._check_source()
        if self.checkpoint is not None:
            check_name("checkpoint", self.checkpoint)


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions(CheckpointOptions):
    """How a model that generates text saves work on a CPU; the text is the same.

    Speed:
        lookup: where the last tokens occurred before, check the tokens that followed them several
            at a time; faster for text that repeats itself.
        prefix_cache: megabytes of memory for the beginnings of prompts: a beginning that prompts
            share is read once; 0 reads every prompt completely.
    """

    lookup: bool = True
    prefix_cache: int = 256

    def _check_source(self) -> None:
        super()._check_source()
        check(self, prefix_cache=(0, 1_000_000))


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How files of texts are read.

    Text files:
        encoding: text encoding of the files; a UTF-16 or UTF-32 byte order mark overrides the
            default.
        errors: reaction to bytes that are invalid in the encoding, to NUL characters, and to lone
            surrogates in JSON: stop (strict), or replace them by U+FFFD (replace).
        csv_column: column to read from a .csv, .tsv or .parquet file with several columns.
        csv_header: treat the first line of a .csv or .tsv file as a header.
        json_field: field to read from each object in a .jsonl or .json file (default: text, or the
            fields of a dialogue; for --prompts, prompt or tokens).
    """

    encoding: str = "utf-8"
    errors: Literal["strict", "replace"] = "strict"
    csv_column: str | None = None
    csv_header: bool = True
    json_field: str | None = None

    def _check_files(self) -> None:
        for flag in ("csv_column", "json_field"):
            if getattr(self, flag) == "":
                raise UsageError(f"--{flag} must name a column or field, got ''")
        if self.csv_column is not None and not self.csv_header:
            raise UsageError("--csv_column needs a header: remove --csv_header=false")
        try:
            "x".encode(self.encoding)
        except (LookupError, UnicodeError):
            raise UsageError(f"unknown --encoding {self.encoding!r}") from None


@dataclass(frozen=True, kw_only=True)
class TextOptions(FileOptions):
    """How text files become token ids.

    Text files:
        combine: join files shorter than N characters, with a separator between them.
        special: meaning of a literal <|endoftext|> or other special token in a file: the token, or
            plain text.
        lines: treat every non-blank line of a text file as a document of its own.
        uer_compat: read text exactly as UER-py's lm processor does, including its defects: blank
            lines are documents, a last line without a newline is lost, and with --sampling
            documents the padding after a short piece is predicted once; implies --lines.
        template: form of each record, with its fields in braces, such as
            "Q:\\n{prompt}\\nA:\\n{completion}"; for messages, the form of each message, such as
            "{role}:\\n{content}\\n" (default: {prompt}{completion}; for messages, {content} and
            the end token).
        loss: tokens that count in the loss: all, or only each completion (for messages, each one of
            the assistant) with the text or end token after it.
        workers: encoding threads; 0 starts one per core.
    """

    combine: int = 50000
    special: Literal["token", "text"] = "token"
    lines: bool = False
    uer_compat: bool = False
    template: str | None = None
    loss: Literal["all", "completion"] = "all"
    workers: int = 0

    @property
    def reads_lines(self) -> bool:
        """Whether each line is a document."""
        return self.lines or self.uer_compat

    def _check_text(self) -> None:
        if self.workers < 0:
            raise UsageError(f"--workers must be at least 0, got {self.workers}")
        for flag in ("dataset", "val_dataset", "in_text"):
            if getattr(self, flag, None) == "":
                raise UsageError(f"--{flag} must name a file, a folder or a glob, got ''")
        if self.combine < 1:
            raise UsageError(f"--combine must be at least 1, got {self.combine}")
        self._check_files()
        if self.template is not None:
            split_template(self.template)
            if self.csv_column is not None or self.json_field is not None:
                raise UsageError(
                    "--template names the fields: remove --csv_column and --json_field"
                )


@functools.cache
def split_template(template: str) -> tuple[tuple[str, str | None], ...]:
    r"""Return the pieces of a --template: (text, the field after it or None).

    In the text, \n is a line end, \t a tab and \\ a backslash.

    Raises:
        UsageError: braces do not match, or there is no field.
    """
    escapes = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
    pieces = []
    try:
        for text, field, spec, conversion in string.Formatter().parse(template):
            if field is not None and (spec or conversion or not field.strip()):
                raise ValueError(f"{{{field}}} must be the name of a field")
            text = re.sub(r"\\[nt\\]", lambda match: escapes[match[0]], text)
            pieces.append((text, field))
    except ValueError as error:
        raise UsageError(
            f"--template {template!r}: {error}. For a literal brace, write {{{{ or }}}}"
        ) from None
    if not any(field for _, field in pieces):
        raise UsageError(f"--template {template!r} needs a field in braces, such as {{prompt}}")
    return tuple(pieces)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How a text is continued; the keyword arguments of `LanguageModel.generate`.

    Length and end:
        length: number of tokens to generate (default: n_ctx, or half of it after a prompt).
        min_length: number of generated tokens before an end token or --stop may end a sample;
            transformers' min_length and max_length also count the prompt.
        stop: text that ends a sample, such as a blank line; it is not printed.
        keep_stop: print the --stop text as well.
        truncate: cut the printed text before the first occurrence of this text.
        include_prefix: print the prompt before its continuation.

    Special tokens:
        special: meaning of a literal <|endoftext|> or other special token in a prompt: the token,
            or plain text. For the files of encode and train, the default is token.

    Sampling:
        temperature: sharpness of the distribution: below 1 favours likely tokens, above 1 unlikely
            ones; 0 always takes the likeliest token.
        top_k: sample from the K likeliest tokens; 0 samples from all.
        top_p: sample from the smallest set of tokens whose probability reaches P (nucleus
            sampling); 0 samples from all, as in nshepperd/gpt-2 (in OpenAI's code, transformers and
            the API of `serve`, 0 takes the likeliest token).
        repetition_penalty: above 1 makes tokens that already occurred less likely (CTRL, arXiv
            1909.05858).
        no_repeat_ngram: never write the same N tokens in a row twice; 0 allows repeats.
        seed: seed of the samples: the same seed gives the same samples at any batch size (default:
            random, and printed).
        window: context after n_ctx tokens: half drops the older half and continues; last reads the
            last n_ctx - 1 tokens again for every token (slow).

    Beam search:
        beams: number of beams; more than 1 returns the --nsamples likeliest continuations instead
            of random ones, as transformers does, one prompt at a time.
        length_penalty: exponent of the length in a beam's score, log-probability / length **
            penalty; above 0 favours long texts.

    Output:
        nsamples: number of samples for each prompt.
        batch_size: number of samples to generate side by side.
        logprobs: add each token's log-probability (in nats, before temperature and sampling) to the
            lines of --format jsonl.
    """

    length: int | None = None
    min_length: int = 0
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    truncate: str | None = None
    include_prefix: bool = False
    special: Literal["token", "text"] = "text"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    seed: int | None = None
    window: Literal["half", "last"] = "half"
    beams: int = 1
    length_penalty: float = 1.0
    nsamples: int = 1
    batch_size: int = 1
    logprobs: bool = False

    def __post_init__(self) -> None:
        check(
            self,
            length=(1, MAX_TOKENS),
            temperature=(0, None),
            top_k=(0, MAX_TOKENS),
            top_p=(0, 1),
            seed=(0, MAX_SEED),
            nsamples=(0, MAX_TOKENS),
            batch_size=(1, MAX_TOKENS),
            min_length=(0, MAX_TOKENS),
            no_repeat_ngram=(0, MAX_TOKENS),
            beams=(1, 1000),
        )
        self._check_beams()
        if self.repetition_penalty <= 0:
            raise UsageError(f"--repetition_penalty must be above 0, got {self.repetition_penalty}")
        if "" in self.stop or self.truncate == "":
            raise UsageError("--stop and --truncate must not be empty")
        if self.keep_stop and not self.stop:
            raise UsageError("--keep_stop needs --stop TEXT")
        if self.length is not None and self.min_length > self.length:
            raise UsageError(f"--min_length {self.min_length} is more than --length {self.length}")

    def _check_beams(self) -> None:
        if self.beams == 1:
            if self.length_penalty != 1:
                raise UsageError("--length_penalty needs --beams above 1")
            return
        if not 1 <= self.nsamples <= self.beams:
            raise UsageError(
                f"--beams {self.beams} can return 1 to {self.beams} samples, not {self.nsamples}: "
                "change --nsamples"
            )
        drawn = {"temperature": 1.0, "top_k": 0, "top_p": 0.0}
        given = [name for name, default in drawn.items() if getattr(self, name) != default]
        if given:
            raise UsageError(
                f"--beams searches for the likeliest texts and does not sample: remove --{given[0]}"
            )
