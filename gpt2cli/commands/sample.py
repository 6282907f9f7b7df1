"""gpt2cli sample: a prompt in, text out."""

import contextlib
import dataclasses
import hashlib
import heapq
import itertools
import json
import operator
import sys
import time
from pathlib import Path

from tqdm import tqdm

from gpt2cli import files, folders, jobs, processes
from gpt2cli.config import new_seed
from gpt2cli.errors import UserError


def run(config):
    """Write the samples to standard output, and with --run_name into samples/RUN_NAME/ as well.

    With --out into that file, or into --nfiles of them, and nowhere else; as jsonl a file that is
    gone on with where it was left, see jobs.py.
    """
    prefix = folders.find_checkpoint(folders.source_dir(config))
    folders.read_config(prefix.parent)
    prompts = read_prompts(config)
    for path in out_paths(config):
        if path.is_dir():
            raise UserError(f"{path} is a folder; --out takes the name of a file")
    if config.is_job():
        run_job(config, prefix, prompts)
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


def _load(config, prefix, prompts, quiet=False):
    """The model; what is not as the user may think is said."""
    from gpt2cli import engine, inference  # what can be refused was refused before this import

    engine.keep_no_memory()
    model = inference.load_model(prefix, config.precision)
    if quiet:
        return model
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
    return model.answers(((first + i, prompt) for i, prompt in _jobs(config, prompts)), config)


def _jobs(config, prompts):
    """(index, prompt) of each sample of this --shard, or with --beams of the first of a prompt."""
    part, parts = config.shard_of()
    repeated = 1 if config.beams > 1 else config.nsamples
    return [
        (number * config.nsamples + i, prompt)
        for number, prompt in enumerate(prompts)
        if number % parts == part
        for i in range(repeated)
    ]


# What has no influence on a sample; the weights are known by their checksum.
NO_MATTER = (
    *("model_name", "run_name", "models_dir", "checkpoint_dir", "sample_dir", "verbose"),
    *("prompt", "prompt_file", "prompts", "out", "nfiles", "batch_size", "delimiter", "format"),
    "processes",
)


def run_job(config, prefix, prompts):
    """Fill --out with a line of JSON for each sample; go on where an earlier command stopped.

    Raises:
        BusyError: another process fills it.
        UserError: at the end, where a prompt has no answer; its line says why.
    """
    job = {k: v for k, v in dataclasses.asdict(config).items() if k not in NO_MATTER}
    job["stop"] = list(config.stop)  # as JSON gives it back
    asked = json.dumps(prompts).encode("ascii")
    job["prompts"] = hashlib.sha256(asked).hexdigest()
    job["weights"] = files.digest(f"{prefix}.index")  # which has the checksum of each of them
    with jobs.gathered(config.out, job, {"seed": new_seed()}) as lines:
        config = dataclasses.replace(config, seed=lines.job["seed"])
        count = _processes(config, prompts)
        if count > 1 and not lines.found:  # what one process began, one goes on with
            summary, failures = _share(lines, config, count, len(prompts))
        else:
            summary, failures = _fill(lines, config, prefix, prompts)
    if failures:
        raise UserError(f'{summary}. The lines with "error" say why')
    print(summary, file=sys.stderr)


def _fill(lines, config, prefix, prompts):
    """Generate what is not there yet; returns what to say of it and the number of failures.

    A group of prompts after another, which are batches: they are the same after a stop.
    """
    todo, each = _jobs(config, prompts), config.nsamples if config.beams > 1 else 1
    size = 1 if config.beams > 1 else config.batch_size
    indices = [index + place for index, _ in todo for place in range(each)]
    there = [index for index, _ in lines.found]
    pairs = zip(there, indices, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    lines.keep(same if same == len(indices) else same - same % (size * each))
    begin, tokens = len(lines.found) // each, 0
    failures = sum(failed for _, failed in lines.found)
    model = _load(config, prefix, prompts, quiet=True) if begin < len(todo) else None
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
    speed = tokens / max(time.monotonic() - begun, 1e-9)
    count = len({index // config.nsamples for index in indices})
    earlier = f", {len(lines.found):,} samples were there" if lines.found else ""
    return (
        f"{config.out}: {count:,} prompts, {tokens:,} tokens, {speed:,.1f} tokens/s, "
        f"{failures:,} failures{earlier}",
        failures,
    )


def _processes(config, prompts):
    """How many processes are to answer."""
    whole = config.prompts is not None and config.shard is None
    count = config.processes or (len(processes.gpus()) if config.precision != "int8" else 1)
    return min(count, len(prompts)) if whole else 1


def _share(lines, config, count, number):
    """As `_fill`, by processes that answer a shard each; their files are joined in order."""
    begun = time.monotonic()
    names = [f"{config.out}.{part}-of-{count}" for part in range(1, count + 1)]
    parts = [
        dataclasses.replace(config, shard=f"{part}/{count}", out=name, processes=1)
        for part, name in enumerate(names, 1)
    ]
    for name in names:  # of an earlier command, which was ended while it joined them
        Path(name).unlink(missing_ok=True)
    for part, (status, said) in enumerate(processes.run("sample", parts), 1):
        if not Path(names[part - 1]).is_file():  # status 1 alone may be prompts without an answer
            raise UserError(
                f"process {part} of {count} ended with status {status}: {said}. The same command "
                "goes on where it stopped"
            )
    lines.keep(0)
    tokens = failures = 0
    with contextlib.ExitStack() as stack:
        opened = [map(json.loads, stack.enter_context(open(n, encoding="utf-8"))) for n in names]
        for line in heapq.merge(*opened, key=operator.itemgetter("index")):
            lines.add([line])
            tokens += len(line.get("tokens", ()))
            failures += "error" in line
    for name in names:
        Path(name).unlink()
    speed = tokens / max(time.monotonic() - begun, 1e-9)
    return (
        f"{config.out}: {number:,} prompts, {tokens:,} tokens, {speed:,.1f} tokens/s by {count} "
        f"processes, {failures:,} failures",
        failures,
    )


def _answered(model, config, group, each, width):
    """The lines of a group of (index, prompt), in order."""
    good, made = [], {}
    for index, prompt in group:
        try:
            model.check_prompt(prompt)
            good.append((index, prompt))
        except UserError as error:
            wrong = {"prompt": prompt, "error": str(error)}
            made |= {i: {"index": i, **wrong} for i in range(index, index + each)}
    for sample in model.answers(good, config, width=width):
        made[sample.index] = sample.as_json()
    return [made[index] for index in sorted(made)]


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
