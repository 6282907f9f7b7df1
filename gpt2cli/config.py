"""The sizes of a model and one dataclass a command: its flags, defaults, help and record in one
place.

A command's dataclass is what the command line builds, what the Python functions take and what a run
folder records. The text after each field's name under `Args:` is what `--help` prints.
"""

import dataclasses
import json
import math
import numbers
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Literal

from gpt2cli.errors import UsageError, UserError

# The released sizes; 117M and 345M are the names of the first announcement, before a recount.
ALIASES = {"117M": "124M", "345M": "355M"}
RELEASED = ("124M", "355M", "774M", "1558M")  # openai/gpt-2 DEVELOPERS.md

SIZES = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")  # openai/gpt-2 src/model.py


@dataclass(frozen=True)
class ModelConfig:
    """What `hparams.json` says.

    Args:
        n_vocab: rows of the token embedding.
        n_ctx: positions that the model can see.
        n_embd: width of the residual stream.
        n_head: attention heads in a layer; divides n_embd.
        n_layer: layers.
        extra: keys of the file that this program does not know, kept when it is written again.
    """

    n_vocab: int
    n_ctx: int
    n_embd: int
    n_head: int
    n_layer: int
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in SIZES:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"hparams: {name} must be a whole number above 0, got {value!r}")
        if self.n_embd % self.n_head:
            raise UserError(
                f"hparams: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}"
            )

    @classmethod
    def from_json(cls, text, where="hparams.json"):
        """Parse the text of a hparams.json; `where` names it in errors (UserError)."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"{where} must hold one JSON object with {', '.join(SIZES)}")
        missing = [name for name in SIZES if name not in values]
        if missing:
            raise UserError(f"{where} lacks {', '.join(missing)}")
        extra = {name: value for name, value in values.items() if name not in SIZES}
        try:
            return cls(**{name: values[name] for name in SIZES}, extra=extra)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def to_json(self):
        """The text of hparams.json, unknown keys included."""
        return json.dumps({**{n: getattr(self, n) for n in SIZES}, **self.extra}, indent=2) + "\n"


def fields_of(config_class):
    """Field name -> (type, default or dataclasses.MISSING, help); inherited fields come last."""
    hints = typing.get_type_hints(config_class)
    help_of = {}
    for base in reversed(config_class.__mro__):
        arguments = (base.__doc__ or "").partition("Args:\n")[2]
        for name, text in re.findall(r"^ {8}(\w+): ((?:.+\n?)(?: {12}.+\n?)*)", arguments, re.M):
            help_of[name] = " ".join(text.split())
    own = config_class.__annotations__
    fields = sorted(dataclasses.fields(config_class), key=lambda f: f.name not in own)
    return {f.name: (hints[f.name], f.default, help_of.get(f.name, "")) for f in fields}


def describe_type(hint):
    """How help and errors name a field's type: `int`, `adam|sgd|adamw`, `true|false`, ..."""
    if typing.get_origin(hint) is Literal:
        return "|".join(typing.get_args(hint))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return describe_type(next(t for t in typing.get_args(hint) if t is not type(None)))
    if hint is bool:
        return "true|false"
    if hint == tuple[str, ...]:
        return "text, may be repeated"
    return {int: "int", float: "float", str: "text"}[hint]


def _accepted(hint, value):
    """The value as the field's type, or raise TypeError/ValueError."""
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError
        return value
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = next(t for t in typing.get_args(hint) if t is not type(None))
        return None if value is None else _accepted(inner, value)
    if hint == tuple[str, ...]:
        value = (value,) if isinstance(value, str) else tuple(value)
        if not all(isinstance(item, str) for item in value):
            raise TypeError
        return value
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        if not math.isfinite(value) or (value and not 1e-37 < abs(value) < 1e38):  # of float32
            raise ValueError
        return float(value)
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)  # NumPy's whole numbers as well
    if hint is str and hasattr(value, "__fspath__"):
        return str(value)
    if type(value) is not hint:
        raise TypeError
    return value


def parse_value(hint, text):
    """What somebody typed, as the field's type. Text stays text: no quotes, no tuples, no None.

    Raises:
        ValueError: it is not of that type.
    """
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    if hint is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise ValueError
        return words[text.lower()]
    if hint in (int, float):
        return hint(text)
    return _accepted(hint, text)


def _check(config, **limits):
    """Check types of all fields, then `name=(low, high)` limits, both ends allowed, None open."""
    for name, (hint, _, _) in fields_of(type(config)).items():
        value = getattr(config, name)
        try:
            object.__setattr__(config, name, _accepted(hint, value))
        except (TypeError, ValueError):
            raise UsageError(f"--{name} takes {describe_type(hint)}, not {value!r}") from None
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value is None:
            continue
        if low is not None and value < low:
            raise UsageError(f"--{name} must be at least {low}, got {value}")
        if high is not None and value > high:
            raise UsageError(f"--{name} must be at most {high}, got {value}")


def check_name(flag, name):
    """A model or run name is one folder's name: refuse everything that could lead elsewhere."""
    if not name or name in (".", "..") or re.search(r"[/\\\0\[\]]", name) or name != name.strip():
        raise UsageError(
            f"--{flag} must be the name of one folder, without / \\ [ ], got {name!r}; "
            "set the folder that holds it with --models_dir or --checkpoint_dir"
        )


_SEED = (0, 2**63 - 1)  # one signed 64-bit word of the generator's key
_TOKENS = 2**31 - 1  # ids are counted in 32-bit numbers


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Fetch a released model into models/NAME, or list the names.

    Args:
        model: 124M, 355M, 774M or 1558M (117M and 345M are older names of the first two); none
            lists them.
        models_dir: folder that holds the model folders.
        url: a mirror to use instead of OpenAI's bucket, with the same layout:
            URL/124M/hparams.json, ...
        verbose: show TensorFlow's own messages.
    """

    model: str | None = None
    models_dir: str = "models"
    url: str | None = None
    verbose: bool = False

    def __post_init__(self):
        _check(self)
        if self.model is not None:
            check_name("model", self.model)
        if self.url is not None and not re.match(r"https?://[^/]", self.url):
            raise UsageError(f"--url must begin with http:// or https://, got {self.url!r}")


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How text files become token ids; `encode`, `train` and `evaluate` share these.

    Args:
        combine: join files shorter than this many characters, a separator between them.
        encoding: text encoding of the files.
        errors: what to do with bytes that are not in that encoding: stop (strict) or write U+FFFD
            (replace).
        special: what the literal <|endoftext|> in a file means: the end token, or just text.
        csv_header: the first line of a .csv file is a heading, not a record.
    """

    combine: int = 50000
    encoding: str = "utf-8"
    errors: Literal["strict", "replace"] = "strict"
    special: Literal["token", "text"] = "token"
    csv_header: bool = True

    def _check_text(self):
        for flag in ("dataset", "val_dataset", "in_text"):
            if getattr(self, flag, None) == "":
                raise UsageError(f"--{flag} must name a file, a folder or a glob, got ''")
        if self.combine < 1:
            raise UsageError(f"--combine must be at least 1, got {self.combine}")
        try:
            "x".encode(self.encoding)
        except (LookupError, UnicodeError):
            raise UsageError(f"--encoding {self.encoding!r} is not known to Python") from None


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """Which model a command reads; all but `download` and `train` share these.

    Args:
        model_name: the model to use (default: 124M).
        run_name: use the newest checkpoint of this run instead.
        models_dir: folder that holds the model folders.
        checkpoint_dir: folder that holds the run folders.
        verbose: show TensorFlow's own messages.
    """

    model_name: str | None = None
    run_name: str | None = None
    models_dir: str = "models"
    checkpoint_dir: str = "checkpoint"
    verbose: bool = False

    def _check_source(self):
        if self.model_name is not None and self.run_name is not None:
            raise UsageError("give --model_name or --run_name, not both")
        for flag in ("model_name", "run_name"):
            if getattr(self, flag) is not None:
                check_name(flag, getattr(self, flag))


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(SourceSettings, TextSettings):
    """Turn text into token ids once, so that `train` starts at once.

    Args:
        in_text: a text, .csv (one column) or .jsonl ("text") file, a folder of them, or a glob.
        out_npz: file to write: .npz (as nshepperd/gpt-2's encode.py), or .npy for a corpus larger
            than memory.
    """

    in_text: str
    out_npz: str

    def __post_init__(self):
        _check(self)
        self._check_text()
        self._check_source()
        if not self.out_npz.endswith((".npz", ".npy")):
            raise UsageError(f"OUT must end in .npz or .npy, got {self.out_npz!r}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TextSettings):
    """Fine-tune a model on your own text; Ctrl-C saves and exits.

    Args:
        dataset: text, .csv or .jsonl file, folder or glob of them, or the .npz/.npy that `gpt2cli
            encode` wrote.
        model_name: the model to start from (default: 124M).
        run_name: the run's folder under checkpoint/ and samples/.
        restore_from: latest (the run's newest checkpoint, else the model), fresh (the model), or
            the path of
            a checkpoint, run folder or model folder.
        overwrite: let `--restore_from fresh` replace the checkpoints of an existing run.
        steps: stop when the run has done this many steps in all; 0 runs until Ctrl-C.
        batch_size: sequences in a step (in each of its parts, with --accumulate_gradients).
        seq_length: tokens of a sequence; 0 is the model's n_ctx.
        learning_rate: peak step size of the optimizer.
        optimizer: adam and sgd as in nshepperd/gpt-2, or adamw.
        weight_decay: of adamw; weight matrices only, not gains, biases and embeddings.
        lr_schedule: the rate after the warm-up; linear and cosine reach 0 at --steps.
        warmup_steps: steps over which the rate rises from 0.
        clip_norm: scale gradients down to this global norm; 0 turns it off.
        accumulate_gradients: batches whose gradients are averaged into one step.
        memory_saving_gradients: recompute each layer in the backward pass: less memory, a third
            more work.
        only_train_transformer_layers: leave the two embeddings and the last norm as they are.
        precision: number format of the activations; the weights are kept in float32 in any case.
        noise: fraction of input tokens replaced by random ones, against overfitting.
        seed: of the data order and the samples; drawn and printed if not given.
        print_every: steps between lines; the loss in a line is the last step's.
        sample_every: steps between samples; 0 writes none.
        sample_length: tokens of a sample.
        sample_num: samples each time.
        top_k: sample from the k likeliest tokens, 0 from all (default: 40, or 0 if --top_p is
            given).
        top_p: sample from the likeliest tokens that together reach this probability; 0 from all.
        save_every: steps between checkpoints.
        keep: checkpoints kept, the newest; 0 keeps all.
        val_dataset: text or encoded file for the validation loss; as --dataset.
        val_every: steps between validations; 0 never.
        val_batch_size: sequences in a validation batch.
        val_batch_count: validation batches, the same ones each time.
        models_dir: folder that holds the model folders.
        checkpoint_dir: folder that holds the run folders.
        sample_dir: folder in which samples/RUN_NAME/ is made.
        verbose: show TensorFlow's own messages.
    """

    dataset: str
    model_name: str | None = None
    run_name: str = "run1"
    restore_from: str = "latest"
    overwrite: bool = False
    steps: int = 0
    batch_size: int = 1
    seq_length: int = 0
    learning_rate: float = 0.00002
    optimizer: Literal["adam", "sgd", "adamw"] = "adam"
    weight_decay: float = 0.01
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    clip_norm: float = 0.0
    accumulate_gradients: int = 1
    memory_saving_gradients: bool = False
    only_train_transformer_layers: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    noise: float = 0.0
    seed: int | None = None
    print_every: int = 1
    sample_every: int = 100
    sample_length: int = 1023
    sample_num: int = 1
    top_k: int | None = None
    top_p: float = 0.0
    save_every: int = 1000
    keep: int = 5
    val_dataset: str | None = None
    val_every: int = 0
    val_batch_size: int = 2
    val_batch_count: int = 40
    models_dir: str = "models"
    checkpoint_dir: str = "checkpoint"
    sample_dir: str = "samples"
    verbose: bool = False

    def __post_init__(self):
        _check(
            self,
            steps=(0, None),
            batch_size=(1, None),
            seq_length=(0, None),
            weight_decay=(0, None),
            warmup_steps=(0, None),
            clip_norm=(0, None),
            accumulate_gradients=(1, None),
            noise=(0, 1),
            seed=_SEED,
            print_every=(1, None),
            sample_every=(0, None),
            sample_length=(1, _TOKENS),
            sample_num=(1, None),
            top_k=(0, _TOKENS),
            top_p=(0, 1),
            save_every=(1, None),
            keep=(0, None),
            val_every=(0, None),
            val_batch_size=(1, None),
            val_batch_count=(1, None),
        )
        self._check_text()
        check_name("run_name", self.run_name)
        if self.model_name is not None:
            check_name("model_name", self.model_name)
        if self.learning_rate <= 0:
            raise UsageError(f"--learning_rate must be above 0, got {self.learning_rate}")
        if self.lr_schedule != "constant" and self.steps <= self.warmup_steps:
            raise UsageError(
                f"--lr_schedule {self.lr_schedule} needs --steps above --warmup_steps "
                f"{self.warmup_steps}, got {self.steps}"
            )
        if self.val_every and self.val_dataset is None:
            raise UsageError("--val_every needs --val_dataset, a text that is not trained on")


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """How text is continued; `sample`, `interactive` and Model.generate share these.

    Args:
        length: tokens to generate (default: n_ctx, or half of it after a prompt).
        temperature: below 1 favours likely tokens, above 1 unlikely ones; 0 always takes the
            likeliest.
        top_k: sample from the k likeliest tokens; 0 from all.
        top_p: sample from the likeliest tokens that together reach this probability; 0 from all.
        seed: the same seed gives the same samples, whatever the batch size; drawn and printed if
            not given.
        nsamples: samples of each prompt.
        batch_size: samples generated side by side.
        stop: text that ends a sample; not printed itself.
        min_length: tokens before which neither the end token nor --stop ends a sample.
        truncate: cut what is printed before the first occurrence of this text.
        include_prefix: print the prompt before its continuation.
        repetition_penalty: above 1 makes tokens that already occurred less likely (CTRL, arXiv
            1909.05858).
    """

    length: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int | None = None
    nsamples: int = 1
    batch_size: int = 1
    stop: tuple[str, ...] = ()
    min_length: int = 0
    truncate: str | None = None
    include_prefix: bool = False
    repetition_penalty: float = 1.0

    def __post_init__(self):
        _check(
            self,
            length=(1, _TOKENS),
            temperature=(0, None),
            top_k=(0, _TOKENS),
            top_p=(0, 1),
            seed=_SEED,
            nsamples=(0, None),
            batch_size=(1, None),
            min_length=(0, _TOKENS),
        )
        if self.repetition_penalty <= 0:
            raise UsageError(f"--repetition_penalty must be above 0, got {self.repetition_penalty}")
        if "" in self.stop or self.truncate == "":
            raise UsageError("--stop and --truncate take a text that is not empty")
        if self.length is not None and self.min_length > self.length:
            raise UsageError(f"--min_length {self.min_length} is more than --length {self.length}")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SourceSettings, GenerateSettings):
    """Write text: from nothing, or continuing a prompt.

    Args:
        prompt: the text to continue; - reads it from standard input.
        prompt_file: a file that holds the text to continue.
        prompts: a file of prompts, one a line; in a .jsonl file a text, a list of token ids, or an
            object with
            "prompt" or "tokens".
        run_name: use the newest checkpoint of this run instead; also writes to samples/RUN_NAME/.
        format: OpenAI's banner and the text, or one JSON object a sample.
        precision: number format of the weights and activations.
        nsamples: samples of each prompt; 0 runs until Ctrl-C.
        sample_dir: folder in which samples/RUN_NAME/ is made.
    """

    prompt: str | None = None
    prompt_file: str | None = None
    prompts: str | None = None
    format: Literal["text", "jsonl"] = "text"
    precision: Literal["float32", "bfloat16"] = "float32"
    sample_dir: str = "samples"

    def __post_init__(self):
        super().__post_init__()
        self._check_source()
        given = [n for n in ("prompt", "prompt_file", "prompts") if getattr(self, n) is not None]
        if len(given) > 1:
            raise UsageError("give one of " + " and ".join(f"--{name}" for name in given))


@dataclass(frozen=True, kw_only=True)
class InteractiveConfig(SourceSettings, GenerateSettings):
    """Type a prompt, watch it being continued; settings can be changed in the session.

    Args:
        precision: number format of the weights and activations.
    """

    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        super().__post_init__()
        self._check_source()
        if self.nsamples < 1:
            raise UsageError("--nsamples must be at least 1 here, got 0")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SourceSettings, TextSettings):
    """Measure how well a model predicts a text: mean loss in nats a token, perplexity, tokens.

    Args:
        dataset: text, .csv or .jsonl file, folder or glob of them, or an encoded .npz/.npy.
        batch_size: windows of n_ctx tokens in one pass.
        format: a line to read, or one JSON object.
        precision: number format of the weights and activations.
    """

    dataset: str
    batch_size: int = 1
    format: Literal["text", "json"] = "text"
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        _check(self, batch_size=(1, None))
        self._check_text()
        self._check_source()
