"""gpt2cli sample: prompts in, text out."""

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2cli import answers, files, folders, prompts, shards
from gpt2cli.config import SampleConfig, new_seed
from gpt2cli.continuation import Sample
from gpt2cli.errors import UserError

if TYPE_CHECKING:
    from gpt2cli.inference import Model

Encoded = tuple[prompts.Prompt, list[int]]  # a prompt and its ids


def run(config: SampleConfig) -> None:
    """Print the samples, or write them to --out or to the --nfiles files.

    With --run_name and without --out they are also saved in samples/RUN_NAME/. With --format jsonl
    and one --out file, an earlier command that was stopped is resumed.
    """
    config = resolved(config, os.environ)
    prefix = folders.source_checkpoint(config)
    folders.read_config(prefix.parent)
    texts = prompts.read(config.prompt, config.prompt_file, config.prompts)
    for path in out_paths(config):
        if path.is_dir():
            raise UserError(f"{path} is a folder; --out takes the name of a file")
    if config.is_job():
        answers.run(config, prefix, texts)
        return

    from gpt2cli import engine, inference  # loads TensorFlow, so only when the checks have passed

    engine.keep_no_memory()
    model = inference.load_model(prefix, config.precision)
    print(f"{prefix}: {engine.describe_devices(config.precision)}", file=sys.stderr)
    encoded = _encode(model, texts)
    if config.seed is None:
        config = dataclasses.replace(config, seed=new_seed())
        print(f"seed {config.seed}", file=sys.stderr)
    if config.out is None:
        copy = None
        if config.run_name is not None:
            copy = free_path(Path(config.sample_dir, config.run_name), config, prefix)
        _write(_samples(model, config, encoded), config, copy)
    for number, path in enumerate(out_paths(config)):
        first = number * config.nsamples * len(encoded)
        _write(_samples(model, config, encoded, first), config, path)


def resolved(config: SampleConfig, environment: Mapping[str, str]) -> SampleConfig:
    """Return the config with `auto` in --shard and {shard} in --out replaced."""
    if config.shard is None:
        return config
    shard = shards.resolve(config.shard, environment)
    out = config.out and config.out.replace("{shard}", shard.replace("/", "-of-"))
    return dataclasses.replace(config, shard=shard, out=out)


def _encode(model: "Model", texts: list[prompts.Prompt]) -> list[Encoded]:
    """Encode the prompts; report each that is longer than the model's window."""
    encoded = [(prompt, model.check_prompt(prompt)) for prompt in texts]
    n_ctx = model.config.n_ctx
    for number, (_, ids) in enumerate(encoded, 1):
        if len(ids) > n_ctx:
            cut = f"prompt {number} has {len(ids)} tokens; the model sees only the last {n_ctx}"
            print(cut, file=sys.stderr)
    return encoded


def _samples(
    model: "Model", config: SampleConfig, encoded: list[Encoded], first: int = 0
) -> Iterator[Sample]:
    """Generate the samples of this --shard, numbered as without --shard, from `first` on."""
    numbered: Iterable[tuple[int, Encoded]]
    if config.nsamples:
        step = config.nsamples if config.beams > 1 else 1  # one search gives all of a prompt
        numbered = answers.samples_of(config, encoded)[::step]
    else:
        numbered = enumerate(itertools.cycle(encoded))
    return model.answers(((first + i, *item) for i, item in numbered), config)


def out_paths(config: SampleConfig) -> list[Path]:
    """Return the files to write: NAME.txt, or NAME-1.txt, ... with --nfiles above 1."""
    if config.out is None:
        return []
    path = Path(config.out)
    if config.nfiles == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{n + 1}{path.suffix}") for n in range(config.nfiles)]


def _write(samples: Iterator[Sample], config: SampleConfig, path: Path | None) -> None:
    """Write samples to the path, if there is one, and without --out to standard output."""
    stopped = None
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
            stopped = stop  # the usual end of an endless run, which keeps its samples
    if path is not None:
        print(f"{'also in' if config.out is None else 'wrote'} {path}", file=sys.stderr)
    if stopped:
        raise stopped


def free_path(folder: Path, config: SampleConfig, prefix: Path) -> Path:
    """Return an unused path in samples/RUN_NAME/, named after the checkpoint and the seed."""
    ending = "jsonl" if config.format == "jsonl" else "txt"
    step = prefix.name.removeprefix("model-")
    name = f"sample-{step}-seed{config.seed}"
    suffixes = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    paths = (folder / f"{name}{suffix}.{ending}" for suffix in suffixes)
    return next(path for path in paths if not path.exists())
