"""A job: answer --prompts into --out, one line of JSON per sample, by one process or several."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import heapq
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from gpt2cli import files, machine, signals
from gpt2cli.console import counted, progress, say
from gpt2cli.errors import UserError
from gpt2cli.inference import hints
from gpt2cli.jobs import lines as lines_file
from gpt2cli.jobs import prompts as prompts_file
from gpt2cli.jobs import shards, workers
from gpt2cli.jobs.lines import Lines
from gpt2cli.jobs.prompts import Prompt
from gpt2cli.options import new_seed
from gpt2cli.storage.folders import ModelFolder
from gpt2cli.text import encoder
from gpt2cli.text.encoder import Encoder

if TYPE_CHECKING:
    from gpt2cli.commands.sample import SampleOptions
    from gpt2cli.inference.generator import LanguageModel

Item = TypeVar("Item")
Samples = list[tuple[int, Prompt]]  # the "index" and the prompt of each

# Fields that have no influence on a sample. The checksums stand for the weights.
IRRELEVANT = (
    *("model_name", "run_name", "models_dir", "checkpoint_dir", "sample_dir", "verbose"),
    *("prompt", "prompt_file", "prompts", "out", "nfiles", "batch_size", "delimiter", "format"),
    *("checkpoint", "processes", "lookup", "prefix_cache"),
    *("encoding", "errors", "csv_column", "csv_header", "json_field"),  # the prompts themselves do
)


class Made(NamedTuple):
    """What one command did for a job."""

    tokens: int  # that it generated
    seconds: float  # that it took
    failures: int  # lines with an "error", in the whole job
    found: int  # samples that earlier commands left


def run(options: SampleOptions, folder: ModelFolder, prompts: Sequence[Prompt]) -> None:
    """Write a line of JSON for each sample to --out; resume if an earlier command was stopped.

    Raises:
        BusyError: another process writes it.
        UserError: at the end, if a prompt has no answer; its line gives the reason.
    """
    assert options.out is not None  # it is a job
    samples = samples_of(options, prompts)
    vocabulary = encoder.of_model(folder)
    number = len({index // options.nsamples for index, _ in samples})
    count = _count_processes(options, number)
    parts = [Path(f"{options.out}.{k}-of-{count}") for k in range(1, count + 1) if count > 1]
    job, usual = _record(options, folder, prompts, count)

    def kept() -> str:
        found = sum(1 for part in parts for _ in lines_file.read(part)) if parts else lines.count
        return f"{options.out}: {counted(found, 'sample')} kept; {signals.AGAIN} to resume"

    with (
        lines_file.gathered(Path(options.out), job, usual, new_seed(), parts) as lines,
        signals.leaving(kept),
    ):
        options = dataclasses.replace(options, seed=lines.job["seed"])
        _report(options, folder, vocabulary, samples)
        if parts:
            with prompts_file.snapshot(options, prompts) as theirs:
                made = _launch(lines, parts, theirs, folder, samples)
        else:
            made = _fill(lines, options, folder, vocabulary, samples)
    speed = made.tokens / max(made.seconds, 1e-9)
    by = f" by {count} processes" if parts else ""
    earlier = f", {made.found:,} samples from an earlier run" if made.found else ""
    summary = (
        f"{options.out}: {number:,} prompts, {made.tokens:,} tokens, {speed:,.1f} tokens/s{by}, "
        f"{made.failures:,} failed{earlier}"
    )
    if made.failures:
        raise UserError(f'{summary}. The lines with "error" give the reasons')
    say(summary)


def _record(
    options: SampleOptions, folder: ModelFolder, prompts: Sequence[Prompt], count: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the job that `lines.gathered` records, and what a key means that a record lacks."""
    job = {k: v for k, v in dataclasses.asdict(options).items() if k not in IRRELEVANT}
    usual = {f.name: f.default for f in dataclasses.fields(options) if f.name in job}
    usual["format"] = 1  # the notes of our first versions do not state it
    job |= {
        "stop": list(options.stop),  # JSON has no tuples
        "prompts": hashlib.sha256(json.dumps(prompts).encode("ascii")).hexdigest(),
        # the index contains the checksum of each tensor
        "weights": files.digest(f"{folder.checkpoint}.index"),
        "processes": count,
        "format": lines_file.FORMAT,
    }
    return job, usual


def samples_of(options: SampleOptions, prompts: Sequence[Item]) -> list[tuple[int, Item]]:
    """Return (index, prompt) of each sample of this --shard, in order."""
    part, parts = shards.parse(options.shard)
    return [
        (number * options.nsamples + i, prompts[number])
        for number in range(part, len(prompts), parts)
        for i in range(options.nsamples)
    ]


def _report(
    options: SampleOptions, folder: ModelFolder, vocabulary: Encoder | None, samples: Samples
) -> None:
    """Print notes about the prompts (see inference/hints.py)."""
    prompts = ((prompt, None) for _, prompt in samples[:: options.nsamples])
    typed = options.prompts is None and sys.stderr.isatty()
    found = hints.about(prompts, vocabulary, folder.known_sizes().n_ctx, options, typed)
    for line in found.values():
        say(f"{options.out}: {line}")


def _fill(
    lines: Lines,
    options: SampleOptions,
    folder: ModelFolder,
    vocabulary: Encoder | None,
    samples: Samples,
) -> Made:
    """Generate the missing samples, in the same batches whether the job was stopped or not."""
    size = options.nsamples if options.beams > 1 else options.batch_size
    pairs = zip(lines.found, samples, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0][0] == pair[1][0], pairs))
    lines.keep(same if same == len(samples) else same - same % size)
    begin = len(lines.found)
    failures = sum(has_failed for _, has_failed in lines.found)
    if begin == len(samples):
        return Made(tokens=0, seconds=0.0, failures=failures, found=begin)

    from gpt2cli.inference import generator  # only if it is needed

    model = generator.load_for(options, folder, vocabulary)
    tokens = 0
    start = time.monotonic()
    with progress(len(samples), " samples", done=begin) as bar:
        for first in range(begin, len(samples), size):
            batch = samples[first : first + size]
            made = _answer(model, options, batch, width=min(size, len(samples)))
            lines.add(made)
            tokens += sum(len(line.get("tokens", ())) for line in made)
            failures += sum("error" in line for line in made)
            bar.update(len(batch))
    return Made(tokens, time.monotonic() - start, failures, begin)


def _answer(
    model: LanguageModel, options: SampleOptions, batch: Samples, width: int
) -> list[dict[str, Any]]:
    """Return the lines of a batch, in order."""
    good = []
    made = {}
    special = options.special == "token"
    for index, prompt in batch:
        try:
            good.append((index, prompt, model.check_prompt(prompt, special)))
        except UserError as error:
            made[index] = {"index": index, "prompt": prompt, "error": str(error)}
    if options.beams > 1:
        good = good[:1]  # one search gives all samples of a prompt
    for sample in model.answers(good, options, width=width):
        made[sample.index] = sample.as_json()
    return [made[index] for index in sorted(made)]


def _count_processes(options: SampleOptions, number: int) -> int:
    """Return how many processes share `number` prompts; print why if GPUs stay unused."""
    gpus = _gpus(options)
    count = min(options.processes or len(gpus), number)
    if count < 2 or options.processes:
        return max(count, 1)
    usable = workers.usable_gpus()
    if usable == len(gpus):
        return count
    say(
        f"{options.out}: one process instead of {count}: TensorFlow can use {usable} of "
        f"{len(gpus)} GPUs; run gpt2cli doctor"
    )
    return 1


def _gpus(options: SampleOptions) -> list[str]:
    return machine.gpus() if options.precision != "int8" else []  # int8 runs on the CPU


def _launch(
    lines: Lines, parts: list[Path], options: SampleOptions, folder: ModelFolder, samples: Samples
) -> Made:
    """Have each part answered by a process of its own, then merge the parts by "index"."""
    found = [len(line.get("tokens", ())) for part in parts for line in lines_file.read(part)]
    start = time.monotonic()
    _answer_parts(parts, options, folder)
    tokens = -sum(found)
    failures = 0
    lines.keep(0)  # of a merge that was interrupted
    merged = heapq.merge(*map(lines_file.read, parts), key=lambda line: line.get("index", -1))
    for line, sample in itertools.zip_longest(merged, samples):
        answered = line and (line.get("index"), line.get("prompt"))
        if lines_file.encoded(answered) != lines_file.encoded(sample):
            raise UserError(
                f"{parts[0]} to {parts[-1]} do not fit the prompts of this job: at least one was "
                f"changed. Delete {options.out}.part.json to start from scratch"
            )
        lines.add([line])
        tokens += len(line.get("tokens", ()))
        failures += "error" in line
    return Made(tokens, time.monotonic() - start, failures, len(found))


def _answer_parts(parts: list[Path], options: SampleOptions, folder: ModelFolder) -> None:
    """Run `sample --shard` for each part that is not finished; UserError if one fails."""
    assert folder.checkpoint is not None
    part, of = shards.parse(options.shard)
    commands = {
        path: dataclasses.replace(
            options,
            shard=f"{part + 1 + of * k}/{of * len(parts)}",  # a shard of this shard
            out=str(path),
            processes=1,
            checkpoint=folder.checkpoint.name,  # a training run may save a newer one meanwhile
        )
        for k, path in enumerate(parts)
        if not path.is_file()
    }
    if commands:
        gpus = ", ".join(_gpus(options)) or "none"
        todo = f"{len(commands)} of {len(parts)} parts left, one process each; GPUs: {gpus}"
        say(f"{options.out}: {todo}")
    failed = 0
    with contextlib.closing(workers.run("sample", commands)) as ended:
        for path, how, message in ended:
            if not path.is_file():  # with a file, status 1 means that some prompts failed
                failed += 1
                say(f"{path}: its process ended {how}: {message or '-'}")
    if failed:
        raise UserError(
            f"{options.out}: {failed} of {len(parts)} processes failed, see above. All answers are "
            "kept; rerun the same command to resume"
        )
