"""gpt2cli sample: a prompt in, text out."""

import contextlib
import dataclasses
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt2cli import files
from gpt2cli.errors import UsageError, UserError
from gpt2cli.jobs import job as answers
from gpt2cli.jobs.shards import shard_of_job
from gpt2cli.options import CheckpointOptions, GenerateOptions, new_seed
from gpt2cli.storage import folders


@dataclass(frozen=True, kw_only=True)
class SampleOptions(GenerateOptions, CheckpointOptions):
    """Write text: from nothing, or continuing a prompt.

    Prompt:
        prompt: text to continue; - reads it from standard input.
        prefix: another name for --prompt, as in gpt-2-simple.
        prompt_file: file that contains the text to continue.
        prompts: file of prompts, one per line; in a .jsonl file each line is a text, a list of
            token ids, or an object with "prompt" or "tokens".

    Model:
        run_name: run whose newest checkpoint to use instead of a model; samples also go to
            samples/RUN_NAME/.

    Output:
        nsamples: number of samples for each prompt; 0 runs until Ctrl-C.
        format: text (OpenAI's banner and the text) or jsonl (one JSON object per sample).
        delimiter: line to print after each sample, instead of OpenAI's banner before it.
        out: file to write instead of standard output. With --format jsonl, results go to FILE.part
            first; rerun the same command to resume.
        nfiles: number of files to write, NAME-1.txt, ... for --out NAME.txt, with --nsamples each.
        sample_dir: folder in which samples/RUN_NAME/ is created.

    Sharing work:
        shard: part of --prompts to answer: 3/8 is the third of eight. auto/8 takes the part from
            Slurm's array index (--array=0-7) or Kubernetes' JOB_COMPLETION_INDEX. {shard} in --out
            stands for it, as 3-of-8.
        processes: split the prompts across N processes, one GPU each if available; 0 means one
            process per GPU. Needs --format jsonl --out FILE.

    Environment:
        SLURM_ARRAY_TASK_ID: part that --shard auto/N takes in a Slurm array.
        JOB_COMPLETION_INDEX: part that --shard auto/N takes in an indexed Kubernetes job.
        CUDA_VISIBLE_DEVICES: GPUs that --processes may use.
        XDG_CACHE_HOME: folder for converted programs (default: ~/.cache).

    Examples:
        gpt2cli sample --run_name books --prompt "It was a dark" --length 200 --top_p 0.9
        echo "Once upon a time" | gpt2cli sample --prompt -
        gpt2cli sample --prompts prompts.txt --format jsonl --out answers.jsonl
    """

    prompt: str | None = None
    prefix: str | None = None
    prompt_file: str | None = None
    prompts: str | None = None
    format: Literal["text", "jsonl"] = "text"
    delimiter: str | None = None
    out: str | None = None
    nfiles: int = 1
    sample_dir: str = "samples"
    shard: str | None = None
    processes: int = 0

    def __post_init__(self):
        super().__post_init__()
        self._check_source()
        if self.prefix is not None:
            if self.prompt is not None:
                raise UsageError("--prefix is the same as --prompt: give one of them")
            object.__setattr__(self, "prompt", self.prefix)
            object.__setattr__(self, "prefix", None)
        if self.processes < 0:
            raise UsageError(f"--processes must be at least 0, got {self.processes}")
        if self.processes > 1 and not (self.is_job() and self.prompts):
            raise UsageError(
                "--processes shares --prompts FILE; it needs --format jsonl --out FILE"
            )
        if self.nfiles < 1:
            raise UsageError(f"--nfiles must be at least 1, got {self.nfiles}")
        if self.nfiles > 1 and (self.out is None or not self.nsamples):
            raise UsageError("--nfiles needs --out FILE, and --nsamples above 0")
        if self.nfiles > 1 and (self.beams > 1 or self.temperature == 0):
            raise UsageError("--nfiles with --beams or --temperature 0 would write equal files")
        if self.delimiter is not None and self.format == "jsonl":
            raise UsageError("--delimiter is for --format text; a line of jsonl is one sample")
        if self.shard is not None:
            object.__setattr__(self, "shard", shard_of_job(self.shard, os.environ))
        self.shard_of()
        if self.shard is None and "{shard}" in (self.out or ""):
            raise UsageError("{shard} in --out stands for --shard, which is not given")
        if self.shard is not None and self.out is not None:
            named = self.out.replace("{shard}", self.shard.replace("/", "-of-"))
            object.__setattr__(self, "out", named)
        given = [n for n in ("prompt", "prompt_file", "prompts") if getattr(self, n) is not None]
        if len(given) > 1:
            raise UsageError("give one of " + " and ".join(f"--{name}" for name in given))

    def is_job(self):
        """Whether lines are gathered in --out, which may be stopped and gone on with."""
        return self.out is not None and self.format == "jsonl" and self.nfiles == 1 <= self.nsamples

    def shard_of(self):
        """(part, parts) of --shard, the first part being 0; (0, 1) without it."""
        if self.shard is None:
            return 0, 1
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.shard, re.ASCII)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"--shard takes PART/PARTS such as 3/8, not {self.shard!r}")
        if self.prompts is None or not self.nsamples:
            raise UsageError("--shard takes a part of --prompts FILE, with --nsamples above 0")
        return int(match[1]) - 1, int(match[2])


def run(config):
    """Write the samples to standard output, and with --run_name into samples/RUN_NAME/ as well.

    With --out into that file, or into --nfiles of them, and nowhere else; as jsonl a file that is
    gone on with where it was left, see answers.py.
    """
    prefix = folders.source_checkpoint(config)
    folders.read_config(prefix.parent)
    prompts = answers.read_prompts(config)
    for path in out_paths(config):
        if path.is_dir():
            raise UserError(f"{path} is a folder; --out takes the name of a file")
    if config.is_job():
        answers.run_job(config, prefix, prompts)
        return
    model = _load(config, prefix, prompts)
    if config.seed is None:
        config = dataclasses.replace(config, seed=new_seed())
        print(f"seed {config.seed}", file=sys.stderr)
    if config.out is None:
        path = free_path(config, prefix) if config.run_name is not None else None
        _write(_samples(model, config, prompts), config, path)
    for number, path in enumerate(out_paths(config)):
        first = number * config.nsamples * len(prompts)
        _write(_samples(model, config, prompts, first), config, path)


def _load(config, prefix, prompts):
    """The model; what is not as the user may think is said."""
    from gpt2cli import tensorflow as engine  # what can be refused was refused before this import
    from gpt2cli.inference import generator as inference

    engine.keep_no_memory()
    model = inference.load_model(prefix, config.precision)
    print(f"{prefix}: {engine.describe_devices(config.precision)}", file=sys.stderr)
    for number, prompt in enumerate(prompts, 1):
        length, n_ctx = len(model.check_prompt(prompt)), model.config.n_ctx
        if length > n_ctx:
            print(
                f"prompt {number} has {length} tokens; the model sees the last {n_ctx} of them",
                file=sys.stderr,
            )
    return model


def _samples(model, config, prompts, first=0):
    """The Samples of this --shard of the prompts, numbered as without one."""
    if not config.nsamples:
        return model.samples(prompts, config, first)
    mine = answers.of_shard(config, prompts)
    return model.answers(((first + i, prompt, None) for i, prompt in mine), config)


def out_paths(config):
    """The files that --out and --nfiles name: NAME-1.txt, ... for NAME.txt, if more than one."""
    if config.out is None:
        return []
    path = Path(config.out)
    if config.nfiles == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{n + 1}{path.suffix}") for n in range(config.nfiles)]


def _write(samples, config, path):
    """Write samples to a file, if there is a path, and to standard output, if there is no --out."""
    ended = None
    with contextlib.ExitStack() as stack:
        outputs = [] if config.out is not None else [sys.stdout]
        if path is not None:
            file = files.replacing(path, "w", encoding="utf-8", errors="replace")
            outputs.insert(0, stack.enter_context(file))
        try:
            for sample in samples:
                for output in outputs:
                    print(sample.show(config.format, config.delimiter), file=output, flush=True)
        except (KeyboardInterrupt, SystemExit, BrokenPipeError) as stop:
            if config.nsamples:
                raise
            ended = stop  # an endless run is always ended so, and keeps its samples
    if path is not None:
        print(f"{'also in' if config.out is None else 'wrote'} {path}", file=sys.stderr)
    if ended:
        raise ended


def free_path(config, prefix):
    """A file in samples/RUN_NAME/ that does not exist yet, named after checkpoint and seed."""
    folder = Path(config.sample_dir) / config.run_name
    ending = "jsonl" if config.format == "jsonl" else "txt"
    step = prefix.name.removeprefix("model-")
    for again in ("", *(f"-{n}" for n in range(2, 10**6))):
        path = folder / f"sample-{step}-seed{config.seed}{again}.{ending}"
        if not path.exists():
            return path
    raise UserError(f"{folder} is full of samples of this seed; choose another --seed")
