"""A job: answer --prompts into --out, one line of JSON per sample, by one process or several."""

import contextlib
import dataclasses
import hashlib
import heapq
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tqdm import tqdm

from gpt2cli import files, jobs, processes, shards
from gpt2cli.config import SampleConfig, new_seed
from gpt2cli.errors import UsageError, UserError
from gpt2cli.prompts import Prompt

if TYPE_CHECKING:
    from gpt2cli.inference import Model

Item = TypeVar("Item")
Samples = list[tuple[int, Prompt]]  # the "index" and the prompt of each

# Fields that have no influence on a sample. The checksums stand for the weights.
IRRELEVANT = (
    *("model_name", "run_name", "models_dir", "checkpoint_dir", "sample_dir", "verbose"),
    *("prompt", "prompt_file", "prompts", "out", "nfiles", "batch_size", "delimiter", "format"),
    *("checkpoint", "processes"),
)


class Made(NamedTuple):
    """What one command did for a job."""

    tokens: int  # that it generated
    seconds: float  # that it took
    failures: int  # lines with an "error", in the whole job
    found: int  # samples that earlier commands left


def run(config: SampleConfig, prefix: Path, prompts: Sequence[Prompt]) -> None:
    """Write a line of JSON for each sample to --out; resume if an earlier command was stopped.

    Raises:
        BusyError: another process writes it.
        UsageError: several processes cannot read --prompts.
        UserError: at the end, if a prompt has no answer; its line holds the reason.
    """
    assert config.out is not None  # it is a job
    samples = samples_of(config, prompts)
    number = len({index // config.nsamples for index, _ in samples})
    count = _count_processes(config, number)
    parts = [Path(f"{config.out}.{k}-of-{count}") for k in range(1, count + 1) if count > 1]
    job = {k: v for k, v in dataclasses.asdict(config).items() if k not in IRRELEVANT}
    job["stop"] = list(config.stop)  # JSON has no tuples
    job["prompts"] = hashlib.sha256(json.dumps(prompts).encode("ascii")).hexdigest()
    job["weights"] = files.digest(f"{prefix}.index")  # it holds the checksum of each tensor
    job["processes"] = count if count > 1 else None
    with jobs.gathered(Path(config.out), job, new_seed(), parts) as lines:
        config = dataclasses.replace(config, seed=lines.job["seed"])
        if parts:
            made = _launch(lines, parts, config, prefix, samples)
        else:
            made = _fill(lines, config, prefix, samples)
    speed = made.tokens / max(made.seconds, 1e-9)
    by = f" by {count} processes" if parts else ""
    earlier = f", {made.found:,} samples from an earlier run" if made.found else ""
    summary = (
        f"{config.out}: {number:,} prompts, {made.tokens:,} tokens, {speed:,.1f} tokens/s{by}, "
        f"{made.failures:,} failed{earlier}"
    )
    if made.failures:
        raise UserError(f'{summary}. The lines with "error" hold the reasons')
    print(summary, file=sys.stderr)


def samples_of(config: SampleConfig, prompts: Sequence[Item]) -> list[tuple[int, Item]]:
    """Return (index, prompt) of each sample of this --shard, in order."""
    part, parts = shards.parse(config.shard)
    return [
        (number * config.nsamples + i, prompts[number])
        for number in range(part, len(prompts), parts)
        for i in range(config.nsamples)
    ]


def _fill(lines: jobs.Lines, config: SampleConfig, prefix: Path, samples: Samples) -> Made:
    """Generate the missing samples, in the same batches whether the job was stopped or not."""
    size = config.nsamples if config.beams > 1 else config.batch_size
    pairs = zip(lines.found, samples, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0][0] == pair[1][0], pairs))
    lines.keep(same if same == len(samples) else same - same % size)
    begin = len(lines.found)
    failures = sum(has_failed for _, has_failed in lines.found)
    if begin == len(samples):
        return Made(tokens=0, seconds=0.0, failures=failures, found=begin)

    from gpt2cli import engine, inference  # loads TensorFlow, so only if it is needed

    engine.keep_no_memory()
    model = inference.load_model(prefix, config.precision)
    tokens = 0
    start = time.monotonic()
    # disable=None: a bar on a terminal, nothing in a log file
    progress = tqdm(total=len(samples), initial=begin, unit=" samples", disable=None, leave=False)
    with progress:
        for first in range(begin, len(samples), size):
            batch = samples[first : first + size]
            made = _answer(model, config, batch, width=min(size, len(samples)))
            lines.add(made)
            tokens += sum(len(line.get("tokens", ())) for line in made)
            failures += sum("error" in line for line in made)
            progress.update(len(batch))
    return Made(tokens, time.monotonic() - start, failures, begin)


def _answer(
    model: "Model", config: SampleConfig, batch: Samples, width: int
) -> list[dict[str, Any]]:
    """Return the lines of a batch, in order."""
    good = []
    made = {}
    for index, prompt in batch:
        try:
            good.append((index, prompt, model.check_prompt(prompt)))
        except UserError as error:
            made[index] = {"index": index, "prompt": prompt, "error": str(error)}
    if config.beams > 1:
        good = good[:1]  # one search gives all samples of a prompt
    for sample in model.answers(good, config, width=width):
        made[sample.index] = sample.as_json()
    return [made[index] for index in sorted(made)]


def _count_processes(config: SampleConfig, number: int) -> int:
    """Return how many processes share `number` prompts; print why if GPUs stay unused."""
    path = config.prompts or ""
    # a child process finds something else in a pipe or in /dev/stdin
    can_reread = os.path.isfile(path) and not path.startswith(("/dev/", "/proc/"))
    gpus = _gpus(config)
    count = min(config.processes or len(gpus), number)
    if config.processes > 1 and not can_reread:
        raise UsageError(
            f"{path} can be read only once, but each of the --processes reads it. "
            "Write the prompts to a file"
        )
    if count < 2 or config.processes:
        return max(count, 1)
    if not can_reread:
        reason = f"{path} can be read only once"
    elif (usable := processes.usable_gpus()) < len(gpus):
        reason = f"TensorFlow can use {usable} of {len(gpus)} GPUs; run gpt2cli doctor"
    else:
        return count
    print(f"{config.out}: one process instead of {count}: {reason}", file=sys.stderr)
    return 1


def _gpus(config: SampleConfig) -> list[str]:
    return processes.gpus() if config.precision != "int8" else []  # int8 runs on the CPU


def _launch(
    lines: jobs.Lines, parts: list[Path], config: SampleConfig, prefix: Path, samples: Samples
) -> Made:
    """Have each part answered by a process of its own, then merge the parts by "index"."""
    found = [len(line.get("tokens", ())) for part in parts for line in jobs.read(part)]
    start = time.monotonic()
    _answer_parts(parts, config, prefix)
    tokens = -sum(found)
    failures = 0
    lines.keep(0)  # of a merge that was interrupted
    merged = heapq.merge(*map(jobs.read, parts), key=lambda line: line.get("index", -1))
    for line, sample in itertools.zip_longest(merged, samples):
        answered = line and (line.get("index"), line.get("prompt"))
        if jobs.encoded(answered) != jobs.encoded(sample):
            raise UserError(
                f"{config.prompts} was changed while {parts[0]} to {parts[-1]} were written. "
                f"Delete {config.out}.part.json to start from scratch"
            )
        lines.add([line])
        tokens += len(line.get("tokens", ()))
        failures += "error" in line
    return Made(tokens, time.monotonic() - start, failures, len(found))


def _answer_parts(parts: list[Path], config: SampleConfig, prefix: Path) -> None:
    """Run `sample --shard` for each part that is not finished; UserError if one fails."""
    part, of = shards.parse(config.shard)
    commands = {
        path: dataclasses.replace(
            config,
            shard=f"{part + 1 + of * k}/{of * len(parts)}",  # a shard of this shard
            out=str(path),
            processes=1,
            checkpoint=prefix.name,  # a training run may save a newer one meanwhile
        )
        for k, path in enumerate(parts)
        if not path.is_file()
    }
    if commands:
        gpus = ", ".join(_gpus(config)) or "none"
        todo = f"{len(commands)} of {len(parts)} parts to do, one process each; GPUs: {gpus}"
        print(f"{config.out}: {todo}", file=sys.stderr)
    failed = 0
    with contextlib.closing(processes.run("sample", commands)) as ended:
        for path, how, message in ended:
            if not path.is_file():  # with a file, status 1 means that some prompts failed
                failed += 1
                print(f"{path}: its process ended {how}: {message or '-'}", file=sys.stderr)
    if failed:
        raise UserError(
            f"{config.out}: {failed} of {len(parts)} processes failed, see above. All answers are "
            "kept; rerun the same command to resume"
        )
