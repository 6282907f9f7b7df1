"""gpt2cli sample: a prompt in, text out."""

import contextlib
import dataclasses
import sys
from pathlib import Path

from gpt2cli import files
from gpt2cli.config import new_seed
from gpt2cli.errors import UserError
from gpt2cli.jobs import job as answers
from gpt2cli.storage import folders


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
    return model.answers(((first + i, prompt) for i, prompt in mine), config)


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
