"""A job of prompts: what --prompts names, answered into --out as lines of JSON.

By one process or by several, each of which has a shard; jobs.py knows the file, processes.py how
they are started.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from gpt2cli import files
from gpt2cli.errors import UsageError, UserError
from gpt2cli.jobs import lines as jobs
from gpt2cli.jobs import workers as processes
from gpt2cli.options import new_seed


def read_prompts(config):
    """The prompts that the flags name: texts, lists of ids, or [None] for text from nothing."""
    if config.prompts is not None:
        return list(_prompts_in(Path(config.prompts)))
    if config.prompt_file is not None:
        return [_without_newline(files.read_text(config.prompt_file))]
    if config.prompt == "-":
        try:
            return [_without_newline(sys.stdin.buffer.read().decode("utf-8"))]
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 text: byte {error.start}") from None
    return [config.prompt]


def _without_newline(text):
    """The final newline belongs to the file or to `echo`, not to the prompt."""
    return text.removesuffix("\n").removesuffix("\r")


def _prompts_in(path):
    """The prompts of a file, one a line; blank lines are none."""
    lines = files.read_text(path).removeprefix("\ufeff").split("\n")
    lines = [(n, line.removesuffix("\r")) for n, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise UserError(f"{path} holds no prompt; write one a line")
    for number, line in lines:
        if path.suffix.lower() != ".jsonl":
            yield line
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from None
        if isinstance(value, dict):
            value = value.get("prompt", value.get("tokens"))
        ids = isinstance(value, list) and value and all(type(item) is int for item in value)
        if not (isinstance(value, str) or ids):
            raise UserError(
                f"{path} line {number} must be a text, a list of token ids, or an object with "
                '"prompt" or "tokens"'
            )
        yield value


def of_shard(config, prompts):
    """(index, prompt) of each sample of this --shard, or with --beams of the first of a prompt."""
    part, parts = config.shard_of()
    repeated = 1 if config.beams > 1 else config.nsamples
    return [
        (number * config.nsamples + i, prompt)
        for number, prompt in enumerate(prompts)
        if number % parts == part
        for i in range(repeated)
    ]


def _indices(config, prompts):
    """The "index" of each line of the job, in order."""
    each = config.nsamples if config.beams > 1 else 1
    return [index + place for index, _ in of_shard(config, prompts) for place in range(each)]


# What has no influence on a sample; the weights are known by their checksum.
NO_MATTER = (
    *("model_name", "run_name", "models_dir", "checkpoint_dir", "sample_dir", "verbose"),
    *("prompt", "prompt_file", "prompts", "out", "nfiles", "batch_size", "delimiter", "format"),
    *("checkpoint", "processes"),
)


def run_job(config, prefix, prompts):
    """Fill --out with a line of JSON for each sample; go on where an earlier command stopped.

    Raises:
        BusyError: another process fills it.
        UsageError: several processes cannot read --prompts.
        UserError: at the end, where a prompt has no answer; its line says why.
    """
    if config.processes > 1 and _read_once(config):
        raise UsageError(
            f"each of --processes reads --prompts again, and {config.prompts} can be read once. "
            "Write the prompts into a file"
        )
    job = {k: v for k, v in dataclasses.asdict(config).items() if k not in NO_MATTER}
    job["stop"] = list(config.stop)  # as JSON gives it back
    asked = json.dumps(prompts).encode("ascii")
    job["prompts"] = hashlib.sha256(asked).hexdigest()
    job["weights"] = files.digest(f"{prefix}.index")  # which has the checksum of each of them
    with jobs.gathered(config.out, job, {"seed": new_seed()}) as lines:
        config = dataclasses.replace(config, seed=lines.job["seed"])
        if _count(lines, config, prompts) > 1:
            summary, failures = _share(lines, config, prefix, prompts)
        else:
            summary, failures = _fill(lines, config, prefix, prompts)
    if failures:
        raise UserError(f'{summary}. The lines with "error" say why')
    print(summary, file=sys.stderr)


def _fill(lines, config, prefix, prompts):
    """Generate what is not there yet; returns what to say of it and the number of failures.

    A group of prompts after another, which are batches: they are the same after a stop.
    """
    todo, each = of_shard(config, prompts), config.nsamples if config.beams > 1 else 1
    size = 1 if config.beams > 1 else config.batch_size
    indices = _indices(config, prompts)
    there = [index for index, _ in lines.found]
    pairs = zip(there, indices, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    lines.keep(same if same == len(indices) else same - same % (size * each))
    begin, tokens = len(lines.found) // each, 0
    failures = sum(failed for _, failed in lines.found)
    model = _load(config, prefix) if begin < len(todo) else None
    begun = time.monotonic()
    # disable=None: a bar on a terminal, nothing in a log file
    with tqdm(total=len(todo), initial=begin, unit=" samples", disable=None, leave=False) as bar:
        for start in range(begin, len(todo), size):
            group = todo[start : start + size]
            made = _answered(model, config, group, each, min(size, len(todo)))
            lines.add(made)
            tokens += sum(len(line.get("tokens", ())) for line in made)
            failures += sum("error" in line for line in made)
            bar.update(len(group))
    return _summary(config, indices, tokens, begun, failures, len(lines.found)), failures


def _load(config, prefix):
    from gpt2cli import tensorflow as engine  # what can be refused was refused before this import
    from gpt2cli.inference import generator as inference

    engine.keep_no_memory()
    return inference.load_model(prefix, config.precision)


def _summary(config, indices, tokens, begun, failures, there, by=""):
    speed = tokens / max(time.monotonic() - begun, 1e-9)
    count = len({index // config.nsamples for index in indices})
    earlier = f", {there:,} samples were there" if there else ""
    return (
        f"{config.out}: {count:,} prompts, {tokens:,} tokens, {speed:,.1f} tokens/s{by}, "
        f"{failures:,} failures{earlier}"
    )


def _read_once(config):
    """Whether --prompts is a pipe, or what a process that is started finds in another place."""
    path = config.prompts or ""
    return path.startswith(("/dev/", "/proc/")) or not os.path.isfile(path)


def _count(lines, config, prompts):
    """How many processes answer: as many as began the job, or else as its flags ask for."""
    indices = _indices(config, prompts)
    number = len({index // config.nsamples for index in indices})
    if [index for index, _ in lines.found] == indices:
        return 1  # all is there
    if not lines.has_parts() and not lines.found:
        count = max(_processes(config, number), 1)
        lines.share(count)
        return count
    count = len(lines.parts) if lines.has_parts() else 1
    if count > 1 and _read_once(config):
        raise UserError(
            f"{config.out} was begun by {count} processes, which read --prompts again, and "
            f"{config.prompts} can be read once. Write the prompts into a file"
        )
    if config.processes and min(config.processes, number) != count:
        began = f"{count} processes, which go" if count > 1 else "one process, which goes"
        print(f"{config.out} was begun by {began} on, whatever --processes says", file=sys.stderr)
    return count


def _processes(config, number):
    """How many processes are to share so many prompts; where not one a GPU, it is said."""
    if config.processes:
        return min(config.processes, number)
    count = min(len(_gpus(config)), number)
    if count > 1:
        reason = None
        if _read_once(config):
            reason = f"{config.prompts} can be read once"
        elif (usable := processes.usable_gpus()) < len(_gpus(config)):
            reason = (
                f"of {len(_gpus(config))} GPUs TensorFlow can use {usable}; "
                "gpt2cli doctor says more"
            )
        if reason:
            print(f"{config.out}: one process, not {count}: {reason}", file=sys.stderr)
            return 1
    return count


def _gpus(config):
    return processes.gpus() if config.precision != "int8" else []


def _share(lines, config, prefix, prompts):
    """As `_fill`, by processes that answer a shard each; their files are joined in order."""
    begun, count = time.monotonic(), len(lines.parts)
    there = [len(line.get("tokens", ())) for line in lines.in_parts()]
    _answer_parts(lines.parts, config, prefix)
    tokens, failures = -sum(there), 0
    indices, joined = _indices(config, prompts), []
    for line in lines.join():
        joined.append(line["index"])
        tokens += len(line.get("tokens", ()))
        failures += "error" in line
    if joined != indices:
        lines.keep(0)
        raise UserError(
            f"{config.out}.*-of-{count} are not the answers to {config.prompts}, which changed "
            "meanwhile. Remove them, and give the same command again"
        )
    by = f" by {count} processes"
    return _summary(config, indices, tokens, begun, failures, len(there), by), failures


def _answer_parts(paths, config, prefix):
    """Have each part that is not finished answered by a process of its own."""
    (shard, shards), count = config.shard_of(), len(paths)
    left = [k for k, path in enumerate(paths) if not path.is_file()]
    if not left:
        return
    configs = [
        dataclasses.replace(
            # every count-th prompt of this shard is a shard of all prompts too
            config,
            shard=f"{shard + 1 + shards * k}/{shards * count}",
            out=str(paths[k]),
            processes=1,
            checkpoint=prefix.name,  # the run may save another one meanwhile
        )
        for k in left
    ]
    some = f"one process for each of {len(left)} parts that are left of {count}"
    told = f"{count} processes" if len(left) == count else some
    names = ", ".join(_gpus(config)) or "none"
    print(f"{config.out}: {told}; GPUs for them: {names}", file=sys.stderr)
    failed = []

    def tell(number, how, said):
        k = left[number]
        if not paths[k].is_file():  # status 1 alone may be prompts without an answer
            failed.append(k)
            print(
                f"{config.out}: process {k + 1} of {count} ended {how}: {said or 'no word'}",
                file=sys.stderr,
            )

    processes.run("sample", configs, tell)
    if failed:
        raise UserError(
            f"{config.out}: {len(failed)} of {count} processes failed, see above; what the others "
            "wrote is kept. The same command goes on where they stopped"
        )


def _answered(model, config, group, each, width):
    """The lines of a group of (index, prompt), in order."""
    good, made = [], {}
    for index, prompt in group:
        try:
            good.append((index, prompt, model.check_prompt(prompt)))
        except UserError as error:
            wrong = {"prompt": prompt, "error": str(error)}
            made |= {i: {"index": i, **wrong} for i in range(index, index + each)}
    for sample in model.answers(good, config, width=width):
        made[sample.index] = sample.as_json()
    return [made[index] for index in sorted(made)]
