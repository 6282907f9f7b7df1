"""gpt2cli sample: a prompt in, text out."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

from gpt2cli import files
from gpt2cli.errors import UserError


def run(config):
    """Write the samples to standard output, and with --run_name into samples/RUN_NAME/ as well.

    With --out into that file, or into --nfiles of them, and nowhere else.
    """
    prefix = files.find_checkpoint(files.source_dir(config))
    files.read_config(prefix.parent)
    prompts = read_prompts(config)
    for path in out_paths(config):
        if path.is_dir():
            raise UserError(f"{path} is a folder; --out takes the name of a file")

    from gpt2cli import engine, inference  # what can be refused was refused before this import

    engine.keep_no_memory()
    model = inference.load_model(prefix, config.precision)
    print(f"{prefix}: {engine.describe_devices()}", file=sys.stderr)
    for number, prompt in enumerate(prompts, 1):
        length, n_ctx = len(model.check_prompt(prompt)), model.config.n_ctx
        if length > n_ctx:
            print(
                f"prompt {number} has {length} tokens; the model sees the last {n_ctx} of them",
                file=sys.stderr,
            )
    if config.seed is None:
        config = dataclasses.replace(config, seed=inference.new_seed())
        print(f"seed {config.seed}", file=sys.stderr)
    if config.out is None:
        path = free_path(config, prefix) if config.run_name is not None else None
        _write(model.samples(prompts, config), config, path)
    for number, path in enumerate(out_paths(config)):
        first = number * config.nsamples * len(prompts)
        _write(model.samples(prompts, config, first), config, path)


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
