"""One dataclass a command: its flags, defaults, help and record in one place.

A command's dataclass is what the command line builds, what the Python functions take and what a run
folder records. The text after each field's name under `Args:` is what `--help` prints.
"""

import re
import secrets
from dataclasses import dataclass
from typing import Literal

from gpt2cli import shards
from gpt2cli.errors import UsageError
from gpt2cli.flags import check


def check_name(flag, name):
    """A model or run name is one folder's name: refuse everything that could lead elsewhere."""
    if not name or name in (".", "..") or re.search(r"[/\\\0\[\]]", name) or name != name.strip():
        raise UsageError(
            f"--{flag} must be one name, without / \\ [ ], got {name!r}; "
            "set the folder that holds it with --models_dir or --checkpoint_dir"
        )


def new_seed():
    """A seed for somebody who gave none: short enough to type again."""
    return secrets.randbelow(2**31)


_SEED = (0, 2**63 - 1)  # one signed 64-bit word of the generator's key
_TOKENS = 2**31 - 1  # ids are counted in 32-bit numbers

Precision = Literal["auto", "float32", "bfloat16", "int8"]  # of a model that is not trained


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Fetch a released model into models/NAME, or list the names.

    Args:
        model: 124M, 355M, 774M or 1558M (117M and 345M are older names of the first two); none
            lists them. hf:OWNER/NAME is a GPT-2 of the Hugging Face hub (or of HF_ENDPOINT).
        models_dir: folder that holds the model folders.
        url: a mirror to use instead of OpenAI's bucket, with the same layout:
            URL/124M/hparams.json, ...
        revision: branch, tag or commit of a hf: model (default: main).
        verbose: show TensorFlow's own messages.
    """

    model: str | None = None
    models_dir: str = "models"
    url: str | None = None
    revision: str | None = None
    verbose: bool = False

    def __post_init__(self):
        check(self)
        if self.model is not None and self.model.startswith("hf:"):
            if not re.fullmatch(r"hf:[\w.-]+/[\w.-]+", self.model, re.ASCII):
                raise UsageError(f"a hub model is named hf:OWNER/NAME, not {self.model!r}")
            check_name("model", self.model.partition("/")[2])
            if self.url is not None:
                raise UsageError("--url is for OpenAI's layout; for hf: set HF_ENDPOINT")
        elif self.model is not None:
            check_name("model", self.model)
        if self.revision is not None and not (self.model or "").startswith("hf:"):
            raise UsageError("--revision belongs to a model hf:OWNER/NAME")
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
        lines: every line of a text file is a document of its own, blank ones apart.
        uer_compat: do as UER-py's lm processor does, defects included: blank lines are documents, a
            last line without a newline is lost, and with --sampling documents the padding that
            follows a short piece is predicted once; implies --lines.
        workers: threads that encode; 0 is one a core.
    """

    combine: int = 50000
    encoding: str = "utf-8"
    errors: Literal["strict", "replace"] = "strict"
    special: Literal["token", "text"] = "token"
    csv_header: bool = True
    lines: bool = False
    uer_compat: bool = False
    workers: int = 0

    def _check_text(self):
        if self.uer_compat:
            object.__setattr__(self, "lines", True)
        if self.workers < 0:
            raise UsageError(f"--workers must be at least 0, got {self.workers}")
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
class CheckpointSettings(SourceSettings):
    """Which model, and which of its checkpoints.

    Args:
        checkpoint: which of its checkpoints to use, as model-2000 or 2000 (default: the newest).
    """

    checkpoint: str | None = None

    def _check_source(self):
        super()._check_source()
        if self.checkpoint is not None:
            check_name("checkpoint", self.checkpoint)


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
        check(self)
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
        restore_from: latest (the run's newest checkpoint, else the model), weights (the same
            without the optimizer's state, which starts anew), fresh (the model), or the path of a
            checkpoint, run folder or model folder.
        overwrite: let `--restore_from fresh` replace the checkpoints of an existing run.
        strategy: which devices train, each with --batch_size sequences: one, mirrored (all GPUs of
            this host), multiworker (those of all hosts that TF_CONFIG names; the first writes the
            run, which all must see), or auto, as many as there are.
        steps: stop when the run has done this many steps in all; 0 runs until Ctrl-C.
        epochs: stop when the run has read the text this many times, instead of --steps.
        sampling: random (windows that begin anywhere), sequential (one window after the other, in
            order), or documents (pieces of one document each, in a new order every time).
        batch_size: sequences in a step on each device (in each of its parts, with
            --accumulate_gradients).
        seq_length: tokens of a sequence; 0 is the model's n_ctx.
        learning_rate: peak step size of the optimizer.
        optimizer: adam and sgd as in nshepperd/gpt-2; adamw; adafactor needs the least memory
            (arXiv 1804.04235; the rate is relative to the weights' size, 0.001 is usual);
            adafactor_gpt2_ml is GPT2_ML's variant of it (a plain rate, 0.0001 is usual).
        weight_decay: of adamw, on weight matrices only, not gains, biases and embeddings; of
            adafactor_gpt2_ml, on embeddings as well.
        dropout: share of activations dropped in training; OpenAI's code has none, UER-py 0.1.
        lr_schedule: the rate after the warm-up; linear and cosine reach 0 at the last step.
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
        keep_every_hours: besides these keep one for good each time so many hours have passed; 0
            keeps none.
        keep_best: besides these save and keep the one of the lowest validation loss.
        val_dataset: text or encoded file for the validation loss; as --dataset.
        val_every: steps between validations; 0 never.
        val_batch_size: sequences in a validation batch.
        val_batch_count: validation batches, the same ones each time.
        patience: stop when so many validations in a row brought no lower loss; 0 never does.
        on_nonfinite: what to do where a loss or gradient is not a finite number: stop, the last
            checkpoint kept, or skip that step (20 in a row at most).
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
    strategy: Literal["auto", "one", "mirrored", "multiworker"] = "auto"
    steps: int = 0
    epochs: int = 0
    sampling: Literal["random", "sequential", "documents"] = "random"
    batch_size: int = 1
    seq_length: int = 0
    learning_rate: float = 0.00002
    optimizer: Literal["adam", "sgd", "adamw", "adafactor", "adafactor_gpt2_ml"] = "adam"
    weight_decay: float = 0.01
    dropout: float = 0.0
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
    keep_every_hours: float = 0.0
    keep_best: bool = False
    val_dataset: str | None = None
    val_every: int = 0
    val_batch_size: int = 2
    val_batch_count: int = 40
    patience: int = 0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    models_dir: str = "models"
    checkpoint_dir: str = "checkpoint"
    sample_dir: str = "samples"
    verbose: bool = False

    def __post_init__(self):
        check(
            self,
            steps=(0, None),
            epochs=(0, None),
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
            keep_every_hours=(0, None),
            patience=(0, None),
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
        if self.dropout < 0 or self.dropout >= 1:
            raise UsageError(f"--dropout must be at least 0 and below 1, got {self.dropout}")
        if self.steps and self.epochs:
            raise UsageError("give --steps or --epochs, not both")
        if self.lr_schedule != "constant" and self.steps <= self.warmup_steps and not self.epochs:
            raise UsageError(
                f"--lr_schedule {self.lr_schedule} needs --steps above --warmup_steps "
                f"{self.warmup_steps}, got {self.steps}"
            )
        for flag in ("patience", "keep_best"):
            if getattr(self, flag) and not self.val_every:
                raise UsageError(f"--{flag} goes by the validation loss: it needs --val_every")
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
        stop: text that ends a sample, such as 。 or a blank line; not printed itself.
        keep_stop: print the --stop text as well.
        min_length: tokens before which neither the end token nor --stop ends a sample.
        truncate: cut what is printed before the first occurrence of this text.
        include_prefix: print the prompt before its continuation.
        repetition_penalty: above 1 makes tokens that already occurred less likely (CTRL, arXiv
            1909.05858).
        no_repeat_ngram: never write the same this many tokens in a row twice; 0 allows it.
        beams: keep this many candidates and return the --nsamples likeliest, instead of drawing at
            random (beam search, as transformers does it); one prompt at a time.
        length_penalty: of beams, whose score is their log-probability / length ** this; above 0
            favours long ones.
        logprobs: with each token its log-probability (nats) before temperature and choice, in
            --format jsonl.
        window: what the model sees when n_ctx tokens are full: half drops the older half and goes
            on; last reads the last n_ctx - 1 tokens again for every token (slow).
    """

    length: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int | None = None
    nsamples: int = 1
    batch_size: int = 1
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    min_length: int = 0
    truncate: str | None = None
    include_prefix: bool = False
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    beams: int = 1
    length_penalty: float = 1.0
    logprobs: bool = False
    window: Literal["half", "last"] = "half"

    def __post_init__(self):
        check(
            self,
            length=(1, _TOKENS),
            temperature=(0, None),
            top_k=(0, _TOKENS),
            top_p=(0, 1),
            seed=_SEED,
            nsamples=(0, None),
            batch_size=(1, None),
            min_length=(0, _TOKENS),
            no_repeat_ngram=(0, _TOKENS),
            beams=(1, 1000),
        )
        if self.beams > 1:
            self._check_beams()
        if self.repetition_penalty <= 0:
            raise UsageError(f"--repetition_penalty must be above 0, got {self.repetition_penalty}")
        if "" in self.stop or self.truncate == "":
            raise UsageError("--stop and --truncate take a text that is not empty")
        if self.length is not None and self.min_length > self.length:
            raise UsageError(f"--min_length {self.min_length} is more than --length {self.length}")

    def _check_beams(self):
        if not 1 <= self.nsamples <= self.beams:
            raise UsageError(
                f"--beams {self.beams} gives 1 to {self.beams} samples, not {self.nsamples}: "
                "change --nsamples"
            )
        drawn = {"temperature": 1.0, "top_k": 0, "top_p": 0.0}
        given = [name for name, default in drawn.items() if getattr(self, name) != default]
        if given:
            raise UsageError(
                f"--beams takes the likeliest, it does not draw: leave out --{given[0]}"
            )


@dataclass(frozen=True, kw_only=True)
class SampleConfig(CheckpointSettings, GenerateSettings):
    """Generate text, from nothing or continuing a prompt.

    Args:
        prompt: the text to continue; - reads it from standard input.
        prefix: the same as --prompt, by its name in gpt-2-simple.
        prompt_file: a file that holds the text to continue.
        prompts: a file of prompts, one per line; in a .jsonl file each line is a text, a list of
            token ids, or an object with "prompt" or "tokens".
        run_name: use the newest checkpoint of this run instead; also writes to samples/RUN_NAME/.
        format: text prints OpenAI's banner and the text, jsonl one JSON object per sample.
        precision: auto is float32; bfloat16 is for GPUs (a CPU rounds the weights to it, no more);
            int8 is the fastest on a CPU, where it always runs, in a quarter of the memory.
        nsamples: samples of each prompt; 0 runs until Ctrl-C.
        delimiter: a line to print after each sample, instead of OpenAI's banner before it.
        out: write to this file instead of standard output, and replace it as a whole. With
            --format jsonl, results go to FILE.part first; rerun the same command to resume.
        shard: answer only one part of --prompts: 3/8 is the third of eight, which together give
            the samples of one command without --shard. auto/8 takes the part from Slurm's array,
            numbered from 0 (--array=0-7 or some of it), or from Kubernetes' JOB_COMPLETION_INDEX.
            {shard} in --out becomes 3-of-8.
        processes: split the prompts across N processes, one GPU each if available; 0 means one
            process per GPU. Needs --format jsonl and --out FILE; resume with the same N.
        nfiles: write this many files, NAME-1.txt, ... for --out NAME.txt, --nsamples in each.
        sample_dir: folder in which samples/RUN_NAME/ is made.
    """

    prompt: str | None = None
    prefix: str | None = None
    prompt_file: str | None = None
    prompts: str | None = None
    format: Literal["text", "jsonl"] = "text"
    precision: Precision = "auto"
    delimiter: str | None = None
    out: str | None = None
    shard: str | None = None
    processes: int = 0
    nfiles: int = 1
    sample_dir: str = "samples"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_source()
        if self.prefix is not None:
            if self.prompt is not None:
                raise UsageError("--prefix is the same as --prompt: give only one of them")
            object.__setattr__(self, "prompt", self.prefix)
            object.__setattr__(self, "prefix", None)
        if self.processes < 0:
            raise UsageError(f"--processes must be at least 0, got {self.processes}")
        if self.processes > 1 and not (self.is_job() and self.prompts):
            raise UsageError("--processes needs --prompts FILE --format jsonl --out FILE")
        if self.nfiles < 1:
            raise UsageError(f"--nfiles must be at least 1, got {self.nfiles}")
        if self.nfiles > 1 and (self.out is None or not self.nsamples):
            raise UsageError("--nfiles needs --out FILE, and --nsamples above 0")
        if self.nfiles > 1 and (self.beams > 1 or self.temperature == 0):
            raise UsageError("--nfiles with --beams or --temperature 0 would write identical files")
        if self.delimiter is not None and self.format == "jsonl":
            raise UsageError("--delimiter needs --format text; in jsonl each line is one sample")
        if self.shard is not None:
            shards.check(self.shard)
            if self.prompts is None or not self.nsamples:
                raise UsageError("--shard needs --prompts FILE, and --nsamples above 0")
        elif "{shard}" in (self.out or ""):
            raise UsageError("{shard} in --out stands for --shard, which is not given")
        given = [n for n in ("prompt", "prompt_file", "prompts") if getattr(self, n) is not None]
        if len(given) > 1:
            raise UsageError("give only one of " + " and ".join(f"--{name}" for name in given))

    def is_job(self) -> bool:
        """Whether --out is written line by line, so that a stopped command can be resumed."""
        return self.out is not None and self.format == "jsonl" and self.nfiles == 1 <= self.nsamples


@dataclass(frozen=True, kw_only=True)
class InteractiveConfig(CheckpointSettings, GenerateSettings):
    """Type a prompt and watch its continuation; settings can be changed during the session.

    Args:
        precision: auto is float32; bfloat16 is for GPUs (a CPU rounds the weights to it, no more);
            int8 is the fastest on a CPU, where it always runs, in a quarter of the memory.
    """

    precision: Precision = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_source()
        if self.nsamples < 1:
            raise UsageError("--nsamples must be at least 1 here, got 0")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(CheckpointSettings):
    """A web page and OpenAI's completions API for one model; needs pip install gpt2cli[serve].

    SIGTERM finishes what was begun and leaves; SIGHUP takes the run's newest checkpoint, or
    --checkpoint again.

    Args:
        host: address to listen on; 0.0.0.0 is every one of the machine's.
        port: port to listen on; 0 takes a free one, and says which.
        api_key: refuse (401) who does not send this as Authorization: Bearer; better given in the
            environment, GPT2CLI_API_KEY, where other users do not see it.
        precision: auto is float32; bfloat16 is for GPUs (a CPU rounds the weights to it, no more);
            int8 is the fastest on a CPU, where it always runs, in a quarter of the memory.
        max_batch: samples generated side by side.
        max_queue: samples that may wait for a place among them; more are refused (503).
        max_n: samples that one request may ask for, over all its prompts.
        max_prompt: tokens of a prompt (default: n_ctx).
        max_tokens: tokens of a sample (default: n_ctx).
        max_body: bytes of a request (413).
        max_time: seconds that a request may take, with its time in the queue (504).
        max_idle: seconds that a client may keep silent before its connection is closed (408 in the
            middle of a request).
        max_connections: connections at once (503).
        log_prompts: write prompts into the log as well.
    """

    host: str = "127.0.0.1"
    port: int = 5000
    api_key: str | None = None
    precision: Precision = "auto"
    max_batch: int = 16
    max_queue: int = 64
    max_n: int = 16
    max_prompt: int | None = None
    max_tokens: int | None = None
    max_body: int = 1_000_000
    max_time: float = 300.0
    max_idle: float = 30.0
    max_connections: int = 1000
    log_prompts: bool = False

    def __post_init__(self):
        check(
            self,
            port=(0, 65535),
            max_batch=(1, 1024),
            max_queue=(0, None),
            max_n=(1, None),
            max_prompt=(1, _TOKENS),
            max_tokens=(1, _TOKENS),
            max_body=(100, None),
            max_time=(0.1, 86400),
            max_idle=(0.1, 86400),
            max_connections=(1, 100_000),
        )
        self._check_source()
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise UsageError("--api_key takes letters, digits and signs without spaces")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(CheckpointSettings, TextSettings):
    """Measure how well a model predicts a text: mean loss in nats a token, perplexity, tokens.

    Args:
        dataset: text, .csv or .jsonl file, folder or glob of them, or an encoded .npz/.npy.
        batch_size: windows of n_ctx tokens in one pass, on a GPU; a CPU takes one after another.
        format: a line to read, or one JSON object.
        precision: auto is float32; bfloat16 is for GPUs (a CPU rounds the weights to it, no more);
            int8 is the fastest on a CPU, where it always runs, in a quarter of the memory.
    """

    dataset: str
    batch_size: int = 1
    format: Literal["text", "json"] = "text"
    precision: Precision = "auto"

    def __post_init__(self):
        check(self, batch_size=(1, None))
        self._check_text()
        self._check_source()


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Turn another program's model into a model folder, or a model folder into Hugging Face's form.

    Args:
        src: a folder or a file: OpenAI's, nshepperd's, gpt-2-simple's or GPT2_ML's checkpoint
            (folder, or its path without ending), a Hugging Face folder, UER-py's or
            TencentPretrain's .bin.
        dst: the folder to make.
        to: openai is the form that all commands here read; hf is that of transformers.
        from_: the form of SRC; auto looks at its files.
        config: the json with the sizes, where it does not lie in SRC (GPT2_ML, UER-py).
        vocab: the vocabulary's file or folder, where it does not lie in SRC.
        n_head: attention heads, which no weight shows, where no json says it (UER-py).
        as_published: keep UER-py's layer-norm gains and epsilon 1e-5 as its own converter does,
            which is inexact, instead of an exact conversion.
        overwrite: replace DST if it exists.
        verbose: show TensorFlow's own messages.
    """

    src: str
    dst: str
    to: Literal["openai", "hf"] = "openai"
    from_: Literal["auto", "openai", "hf", "uer", "gpt2_ml"] = "auto"
    config: str | None = None
    vocab: str | None = None
    n_head: int | None = None
    as_published: bool = False
    overwrite: bool = False
    verbose: bool = False

    def __post_init__(self):
        check(self, n_head=(1, None))


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a run's weights, without the optimizer's state, as a model folder.

    Args:
        run_name: the run.
        dst: the folder to make, such as models/NAME.
        step: which of its checkpoints: a step, or best, of the lowest validation loss of those
            kept (default: the newest).
        overwrite: replace DST, a model's folder.
        checkpoint_dir: folder that holds the run folders.
        verbose: show TensorFlow's own messages.
    """

    run_name: str
    dst: str
    step: str | None = None
    overwrite: bool = False
    checkpoint_dir: str = "checkpoint"
    verbose: bool = False

    def __post_init__(self):
        check(self)
        check_name("run_name", self.run_name)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Make a new model with random weights, for training from nothing.

    Args:
        name: the model's folder, models/NAME.
        vocab: the vocabulary: vocab.txt, or a folder with it or with encoder.json and vocab.bpe
            (gpt2cli vocab makes one).
        size: layers, heads and width of a released size; the flags below change single ones.
        n_layer: layers.
        n_head: attention heads in a layer.
        n_embd: width.
        n_ctx: positions that the model can see.
        n_vocab: rows of the token embedding, if more than the vocabulary has.
        seed: the same seed gives the same weights.
        overwrite: replace the model if it exists.
        models_dir: folder that holds the model folders.
        verbose: show TensorFlow's own messages.
    """

    name: str
    vocab: str
    size: Literal["tiny", "distil", "124M", "355M", "774M", "1558M"] = "124M"
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    n_ctx: int = 1024
    n_vocab: int | None = None
    seed: int = 0
    overwrite: bool = False
    models_dir: str = "models"
    verbose: bool = False

    def __post_init__(self):
        sizes = ("n_layer", "n_head", "n_embd", "n_ctx", "n_vocab")
        check(self, seed=_SEED, **{name: (1, _TOKENS) for name in sizes})
        check_name("name", self.name)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Say what this machine has, what is wrong with it, and what to do.

    Args:
        models_dir: folder that holds the model folders.
        checkpoint_dir: folder that holds the run folders.
        verbose: show TensorFlow's own messages.
    """

    models_dir: str = "models"
    checkpoint_dir: str = "checkpoint"
    verbose: bool = False

    def __post_init__(self):
        check(self)


@dataclass(frozen=True, kw_only=True)
class VocabConfig(TextSettings):
    """Train a vocabulary on a corpus; writes the vocabulary files of a model folder.

    Args:
        in_text: a text, .csv (one column) or .jsonl ("text") file, a folder of them, or a glob.
        out: the folder to write them into.
        kind: bpe is GPT-2's byte-pair encoding, wordpiece BERT's (for Chinese).
        size: tokens in it, special ones included.
        min_frequency: what occurs less often makes no token.
        lower_case: wordpiece: read text in lower case and without accents.
        overwrite: replace vocabulary files that are there.
        verbose: show TensorFlow's own messages.
    """

    in_text: str
    out: str
    kind: Literal["bpe", "wordpiece"] = "bpe"
    size: int = 50257
    min_frequency: int = 2
    lower_case: bool = True
    overwrite: bool = False
    verbose: bool = False

    def __post_init__(self):
        check(self, size=(10, 2**31 - 1), min_frequency=(1, None))
        self._check_text()
