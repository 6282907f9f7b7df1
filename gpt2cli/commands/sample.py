"""gpt2cli sample: prompts in, text out."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gpt2cli import paths, signals
from gpt2cli.console import say
from gpt2cli.errors import UsageError, UserError
from gpt2cli.flags import check
from gpt2cli.jobs.shards import check as check_shard
from gpt2cli.options import FileOptions, GenerateOptions, GeneratorOptions, new_seed

if TYPE_CHECKING:
    from gpt2cli.inference.generator import LanguageModel
    from gpt2cli.inference.text import Sample
    from gpt2cli.jobs.prompts import Prompt
    from gpt2cli.storage.folders import ModelFolder

    Encoded = tuple[Prompt, list[int]]  # a prompt and its ids


@dataclass(frozen=True, kw_only=True)
class SampleOptions(GenerateOptions, FileOptions, GeneratorOptions):
    """Generate text, with or without a prompt.

    Prompt:
        prompt: text to continue; - reads it from standard input.
        prefix: another name for --prompt, as in gpt-2-simple.
        prompt_file: file that contains the text to continue.
        prompts: file of prompts: text with one per line; .jsonl or .json with texts, lists of token
            ids, or objects with "prompt" or "tokens"; or .csv, .tsv or .parquet with a column of
            prompts.

    Model:
        run_name: run whose newest checkpoint to use instead of a model; samples also go to
            samples/RUN_NAME/.

    Output:
        nsamples: number of samples for each prompt; 0 runs until Ctrl-C.
        format: text (OpenAI's banner and the text) or jsonl (one JSON object per sample).
        delimiter: line to print after each sample, instead of OpenAI's banner before it.
        out: file to write instead of standard output. With --format jsonl, results go to FILE.part
            first; rerun the same command to resume.
        nfiles: number of files to write (NAME-1.txt, ... for --out NAME.txt), each with --nsamples.
        sample_dir: folder in which samples/RUN_NAME/ is created.

    Sharing work:
        shard: part of --prompts to answer: 3/8 is the third of eight. auto/8 takes the part from
            Slurm's array index (--array=0-7) or Kubernetes' JOB_COMPLETION_INDEX. {shard} in --out
            is replaced by the part, such as 3-of-8.
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
        gpt2cli sample --run_name chats --prompt "Hello<|endoftext|>" --special token
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

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, processes=(0, 9999), nfiles=(1, 1_000_000))
        self._check_source()
        self._check_files()
        if self.prefix is not None and self.prompt is not None:
            raise UsageError("--prefix is the same as --prompt: give only one of them")
        if self.processes > 1 and not (self.is_job() and self.prompts):
            raise UsageError("--processes needs --prompts FILE --format jsonl --out FILE")
        if self.nfiles > 1 and (self.out is None or not self.nsamples):
            raise UsageError("--nfiles needs --out FILE, and --nsamples above 0")
        if self.nfiles > 1 and (self.beams > 1 or self.temperature == 0):
            raise UsageError("--nfiles with --beams or --temperature 0 would write identical files")
        self._check_output()
        if self.shard is not None:
            check_shard(self.shard)
            if self.prompts is None or not self.nsamples:
                raise UsageError("--shard needs --prompts FILE, and --nsamples above 0")
        elif "{shard}" in (self.out or ""):
            raise UsageError("{shard} in --out needs --shard")
        names = ("prompt", "prefix", "prompt_file", "prompts")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError("give only one of " + " and ".join(f"--{name}" for name in given))
        self._check_file_flags()

    def _check_file_flags(self) -> None:
        """Reject flags about files that are not read."""
        if self.prompts is None:
            needs = dict.fromkeys(("csv_column", "csv_header", "json_field"), "--prompts FILE")
            if self.prompt_file is None and "-" not in (self.prompt, self.prefix):
                text = "--prompts, --prompt_file or --prompt -"
                needs |= dict.fromkeys(("encoding", "errors"), text)
            for field in dataclasses.fields(FileOptions):
                if field.name in needs and getattr(self, field.name) != field.default:
                    raise UsageError(f"--{field.name} needs {needs[field.name]}")

    def _check_output(self) -> None:
        if self.delimiter is not None and self.format == "jsonl":
            raise UsageError("--delimiter needs --format text; in jsonl each line is one sample")
        if self.logprobs and self.format == "text":
            raise UsageError("--logprobs needs --format jsonl; text shows no log-probabilities")
        if self.sample_dir != "samples" and (self.run_name is None or self.out is not None):
            raise UsageError("--sample_dir needs --run_name and cannot be combined with --out")

    def is_job(self) -> bool:
        """Whether --out is written line by line, so that a stopped command can be resumed."""
        return self.out is not None and self.format == "jsonl" and self.nfiles == 1 <= self.nsamples


def run(options: SampleOptions) -> None:
    """Print the samples, or write them to --out or to the --nfiles files.

    With --run_name and without --out they are also saved in samples/RUN_NAME/. With --format jsonl
    and one --out file, an earlier command that was stopped is resumed.
    """
    from gpt2cli.jobs import job, prompts
    from gpt2cli.storage import folders
    from gpt2cli.text import encoder

    options = resolved(options, os.environ)
    _check_paths(options)
    if options.out is not None and os.path.islink(options.out):  # what belongs to it is beside it
        options = dataclasses.replace(options, out=paths.target_of(options.out))
    if options.beams > 1 < options.batch_size:
        say("--batch_size has no effect with --beams: one prompt is searched at a time")
    folder = folders.open_source(options)
    texts = prompts.read(options.prompt, options.prompt_file, options.prompts, options)
    if options.is_job() and not paths.is_stream(options.out or ""):
        job.run(options, folder, texts)
        return
    if options.is_job() and options.processes > 1:
        say(f"--processes has no effect: one process writes into {options.out}")
    vocabulary = encoder.of_model(folder)

    from gpt2cli.inference import devices, generator  # only when the checks have passed

    model = generator.load_for(options, folder, vocabulary)
    say(f"{folder.checkpoint}: {devices.describe(options.precision)}")
    encoded = _encode(model, options, texts)
    if options.seed is None:
        options = dataclasses.replace(options, seed=new_seed())
        say(f"seed {options.seed}")
    if options.out is None:
        copy = None
        if options.run_name is not None:
            copy = free_path(Path(options.sample_dir, options.run_name), options, folder)
        _write(_samples(model, options, encoded), options, copy)
    for number, path in enumerate(out_paths(options)):
        first = number * options.nsamples * len(encoded)
        _write(_samples(model, options, encoded, first), options, path)


def _check_paths(options: SampleOptions) -> None:
    """Reject outputs that cannot be written, before anything is read (UserError)."""
    if options.out is not None:
        paths.check_file(options.out, "out")
        if options.nfiles > 1 and paths.is_stream(options.out):
            raise UserError(f"--nfiles needs --out FILE, and {options.out} is not a file")
        for path in out_paths(options):
            paths.check_file(str(path), "out")
    elif options.run_name is not None:
        paths.check_folder_in(options.sample_dir, options.run_name, "sample_dir")


def resolved(options: SampleOptions, environment: Mapping[str, str]) -> SampleOptions:
    """Return the options with --prefix as --prompt, and `auto` and {shard} replaced."""
    from gpt2cli.jobs import shards

    if options.prefix is not None:
        options = dataclasses.replace(options, prompt=options.prefix, prefix=None)
    if options.shard is None:
        return options
    shard = shards.resolve(options.shard, environment)
    out = options.out and options.out.replace("{shard}", shard.replace("/", "-of-"))
    return dataclasses.replace(options, shard=shard, out=out)


def _encode(model: LanguageModel, options: SampleOptions, texts: list[Prompt]) -> list[Encoded]:
    """Encode the prompts and print notes about them (see inference/hints.py)."""
    from gpt2cli.inference import hints

    encoded = [(text, model.check_prompt(text, options.special == "token")) for text in texts]
    typed = options.prompts is None and sys.stderr.isatty()
    for line in hints.about(encoded, model.encoder, model.config.n_ctx, options, typed).values():
        say(line)
    return encoded


def _samples(
    model: LanguageModel, options: SampleOptions, encoded: list[Encoded], first: int = 0
) -> Iterator[Sample]:
    """Generate the samples of this --shard, numbered as without --shard, from `first` on."""
    from gpt2cli.jobs import job

    numbered: Iterable[tuple[int, Encoded]]
    if options.nsamples:
        step = options.nsamples if options.beams > 1 else 1  # one search gives all of a prompt
        numbered = job.samples_of(options, encoded)[::step]
    else:
        numbered = enumerate(itertools.cycle(encoded))
    return model.answers(((first + i, *item) for i, item in numbered), options)


def out_paths(options: SampleOptions) -> list[Path]:
    """Return the files to write: NAME.txt, or NAME-1.txt, ... with --nfiles above 1."""
    if options.out is None:
        return []
    path = Path(options.out)
    if options.nfiles == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{n + 1}{path.suffix}") for n in range(options.nfiles)]


def _write(samples: Iterator[Sample], options: SampleOptions, path: Path | None) -> None:
    """Write samples to the path, if there is one, and without --out to standard output."""
    from gpt2cli import files

    stopped = None
    with contextlib.ExitStack() as stack:
        outputs = [] if options.out is not None else [sys.stdout]
        if path is not None:
            file = files.replacing(path, "w", through=True, encoding="utf-8", errors="replace")
            outputs.insert(0, stack.enter_context(file))
        try:
            for sample in samples:
                for output in outputs:
                    print(sample.show(options.format, options.delimiter), file=output, flush=True)
        except (KeyboardInterrupt, SystemExit, BrokenPipeError) as stop:
            if options.nsamples:
                if path is not None and not paths.is_stream(path):
                    say(f"{path} was not written: {signals.AGAIN} to start from scratch")
                raise
            stopped = stop  # the usual end of an endless run, which keeps its samples
    if path is not None:
        say(f"{'also in' if options.out is None else 'wrote'} {path}")
    if stopped:
        raise stopped


def free_path(folder: Path, options: SampleOptions, model_folder: ModelFolder) -> Path:
    """Return an unused path in samples/RUN_NAME/, named after the checkpoint and the seed."""
    ending = "jsonl" if options.format == "jsonl" else "txt"
    assert model_folder.checkpoint is not None
    step = model_folder.checkpoint.name.removeprefix("model-")
    name = f"sample-{step}-seed{options.seed}"
    return paths.unused(folder / name, f".{ending}")
