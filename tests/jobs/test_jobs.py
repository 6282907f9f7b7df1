"""A batch job: `sample --prompts --format jsonl --out`, stopped, resumed, in shards."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import PROMPTS, ROOT

from gpt2cli import locks
from gpt2cli.inference import generator as inference
from gpt2cli.jobs import lines as lines_file

FLAGS = ("--model_name", "tiny", "--length", 6, "--top_k", 20, "--format", "jsonl")


def job(cli, out, *more, seed=("--seed", 5)):
    return cli("sample", *FLAGS, *seed, "--prompts", "prompts.txt", "--out", out, *more)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_job_writes_a_line_per_sample_and_reports_in_one_line(cli, prompts):
    result = job(cli, "out.jsonl", "--nsamples", 2, "--batch_size", 3)
    assert result.returncode == 0 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("out.jsonl: 5 prompts, ")
    assert "tokens/s, 0 failed\n" in result.stderr
    found = lines(prompts / "out.jsonl")
    assert [line["index"] for line in found] == list(range(10))
    assert [line["prompt"] for line in found] == [text for text in PROMPTS for _ in range(2)]
    assert f" {sum(len(line['tokens']) for line in found)} tokens," in result.stderr
    assert sorted(p.name for p in prompts.iterdir()) == ["models", "out.jsonl", "prompts.txt"]
    # the same as without --out
    printed = cli("sample", *FLAGS, "--seed", 5, "--prompts", "prompts.txt", "--nsamples", 2)
    assert printed.stdout == (prompts / "out.jsonl").read_text()


class Stopped(Exception):
    pass


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("torn", ["", '{"index": 4, "te', "\0\0\0\0\n", "[]\n", '{"index": 99}\n'])
def test_a_resumed_job_writes_the_same_file_as_an_uninterrupted_one(
    cli, prompts, monkeypatch, torn, beams
):
    more = ("--nsamples", 2, *(("--beams", 2) if beams == 2 else ("--batch_size", 3)))
    more = tuple(word for word in more if (beams, word) != (2, "--top_k"))
    flags = FLAGS if beams == 1 else (*FLAGS[:4], *FLAGS[6:])
    words = ("sample", *flags, "--seed", 5, "--prompts", "prompts.txt", *more, "--out")
    assert cli(*words, "whole.jsonl").returncode == 0

    real, done = inference.LanguageModel.answers, []

    def dying(self, *arguments, **options):
        if len(done) == 2:
            raise Stopped
        done.append(1)
        return real(self, *arguments, **options)

    monkeypatch.setattr(inference.LanguageModel, "answers", dying)
    with pytest.raises(Stopped):
        cli(*words, "out.jsonl")
    monkeypatch.undo()
    monkeypatch.chdir(prompts)
    assert not (prompts / "out.jsonl").exists()
    part = prompts / "out.jsonl.part"
    there = len(lines(part))
    assert there == (6 if beams == 1 else 4)
    with part.open("a") as file:
        file.write(torn)
    result = cli(*words, "out.jsonl")
    assert result.returncode == 0 and f", {there} samples from an earlier run\n" in result.stderr
    assert (prompts / "out.jsonl").read_bytes() == (prompts / "whole.jsonl").read_bytes()
    assert not list(prompts.glob("*.part*"))


def test_a_resumed_job_keeps_the_seed_that_was_drawn(cli, prompts, monkeypatch):
    real, done = inference.LanguageModel.answers, []

    def dying(self, *arguments, **options):
        if done:
            raise Stopped
        done.append(1)
        return real(self, *arguments, **options)

    monkeypatch.setattr(inference.LanguageModel, "answers", dying)
    with pytest.raises(Stopped):
        job(cli, "out.jsonl", seed=())
    monkeypatch.undo()
    monkeypatch.chdir(prompts)
    assert job(cli, "out.jsonl", seed=()).returncode == 0
    (seed,) = {line["seed"] for line in lines(prompts / "out.jsonl")}
    assert job(cli, "again.jsonl", seed=("--seed", seed)).returncode == 0
    assert (prompts / "again.jsonl").read_bytes() == (prompts / "out.jsonl").read_bytes()


def test_the_lines_of_a_different_job_are_moved_away(cli, prompts):
    (prompts / "out.jsonl.part").write_text('{"index": 0, "text": "of another job"}\n')
    (prompts / "out.jsonl.part.json").write_text('{"seed": 4}')
    assert job(cli, "out.jsonl", seed=()).returncode == 0
    found = lines(prompts / "out.jsonl")
    assert len(found) == 5 and found[0]["seed"] != 4  # nor is its seed taken
    assert "of another job" in (prompts / "out.jsonl.part.old").read_text()


def test_lines_that_are_moved_away_are_reported_and_never_overwritten(cli, prompts):
    for text in ("one", "two"):
        (prompts / "out.jsonl.part").write_text(f'{{"index": 0, "text": "{text}"}}\n')
        result = job(cli, "out.jsonl")
        assert (
            result.returncode == 0
            and "out.jsonl.part belongs to a different job; moved to" in result.stderr
        )
    assert "one" in (prompts / "out.jsonl.part.old").read_text()
    assert "two" in (prompts / "out.jsonl.part.old-2").read_text()
    (prompts / "out.jsonl.part").write_text("")
    assert job(cli, "out.jsonl").returncode == 0
    assert not (prompts / "out.jsonl.part.old-3").exists()


def test_the_shards_together_are_the_whole(cli, prompts):
    assert job(cli, "whole.jsonl", "--nsamples", 2).returncode == 0
    for part in (1, 2, 3):
        more = ("--nsamples", 2, "--shard", f"{part}/3")
        assert job(cli, f"part{part}.jsonl", *more).returncode == 0
    together = [line for part in (1, 2, 3) for line in lines(prompts / f"part{part}.jsonl")]
    assert sorted(together, key=lambda line: line["index"]) == lines(prompts / "whole.jsonl")
    assert len(lines(prompts / "part3.jsonl")) == 2
    printed = cli("sample", *FLAGS, "--seed", 5, "--prompts", "prompts.txt", "--shard", "3/3")
    assert [json.loads(line)["index"] for line in printed.stdout.splitlines()] == [2]


def test_a_prompt_that_cannot_be_answered_does_not_stop_the_others(cli, prompts):
    (prompts / "some.jsonl").write_text('"The kettle"\n{"tokens": [99999]}\n"A letter"\n[1, 2]\n')
    words = ("sample", *FLAGS, "--seed", 5, "--prompts", "some.jsonl", "--batch_size", 4)
    result = cli(*words, "--out", "out.jsonl")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "4 prompts" in result.stderr and "1 failed" in result.stderr
    found = lines(prompts / "out.jsonl")
    assert [line["index"] for line in found] == [0, 1, 2, 3]
    assert "99999" in found[1]["error"] and all("text" in found[i] for i in (0, 2, 3))
    alone = cli("sample", *FLAGS, "--seed", 5, "--prompt", "The kettle")
    assert json.loads(alone.stdout) == found[0]


def test_a_second_command_on_the_same_output_is_rejected_as_busy(cli, prompts):
    with locks.locked(prompts / ".out.jsonl.lock", "sample"):
        result = job(cli, "out.jsonl")
    assert result.returncode == 75 and f"process {os.getpid()}" in result.stderr
    assert result.stderr.count("\n") == 1 and not (prompts / "out.jsonl").exists()


def test_a_failed_write_reports_how_to_resume(cli, prompts, monkeypatch):
    from gpt2cli.jobs import lines as jobs

    def full(self, values):
        with jobs._explained(self._path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(jobs.Lines, "add", full)
    result = job(cli, "out.jsonl")
    assert result.returncode == 1 and "rerun the same command to resume" in result.stderr


def check_kills(cli, prompts, rounds, count):
    """Kill a job `rounds` times, each after a new line; then compare with an uninterrupted one."""
    (prompts / "many.txt").write_text("".join(f"{PROMPTS[i % 5]} {i}\n" for i in range(count)))
    words = [*FLAGS, "--seed", 5, "--prompts", "many.txt", "--batch_size", 8, "--length", 4]
    del words[2:4]  # another --length
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "gpt2cli", "sample", *map(str, words), "--out"]
    part, chance = prompts / "out.jsonl.part", random.Random(rounds)
    for _ in range(rounds):
        before = part.stat().st_size if part.exists() else 0
        process = subprocess.Popen([*command, "out.jsonl"], cwd=prompts, env=environment)
        while not (part.exists() and part.stat().st_size > before):
            assert process.poll() is None, "it ended before it was killed; use more prompts"
            time.sleep(0.01)
        time.sleep(chance.random() / 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (prompts / "out.jsonl").exists()
    for name in ("out.jsonl", "whole.jsonl"):
        assert cli("sample", *words, "--out", name).returncode == 0
    assert len(lines(prompts / "out.jsonl")) == count
    assert (prompts / "out.jsonl").read_bytes() == (prompts / "whole.jsonl").read_bytes()


def test_a_killed_job_resumes(cli, prompts):
    check_kills(cli, prompts, 1, 1_000)


@pytest.mark.slow
def test_a_job_that_is_killed_a_hundred_times_resumes(cli, prompts):
    check_kills(cli, prompts, 100, 60_000)


@pytest.mark.parametrize("processes", [None, 1, "missing"])
def test_a_job_of_an_earlier_version_resumes(cli, prompts, monkeypatch, processes):
    """Its note says 1, null or nothing where one process writes it."""
    assert job(cli, "whole.jsonl").returncode == 0
    real = inference.LanguageModel.answers

    def dying(*arguments, **settings):
        yield from itertools.islice(real(*arguments, **settings), 0)
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(inference.LanguageModel, "answers", dying)
        job(cli, "out.jsonl")
    (prompts / "out.jsonl.part").write_text((prompts / "whole.jsonl").read_text().split("\n")[0])
    note = prompts / "out.jsonl.part.json"
    known = json.loads(note.read_text()) | {"processes": processes}
    if processes == "missing":
        del known["processes"], known["special"]  # flags that came later
    note.write_text(json.dumps(known))
    result = job(cli, "out.jsonl")
    assert result.returncode == 0 and "moved to" not in result.stderr
    assert (prompts / "out.jsonl").read_bytes() == (prompts / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    "change",
    [{"seed": "x"}, {"seed": [1]}, {"seed": True}, {"seed": 10**30}, {"seed": None},
     {"processes": "2"}, {"processes": [2]}],
)  # fmt: skip
def test_a_job_note_with_odd_numbers_belongs_to_a_different_job(cli, prompts, change):
    note = prompts / "out.jsonl.part.json"
    (prompts / "out.jsonl.part").write_text('{"index": 0, "tokens": 5}\n')
    note.write_text(json.dumps({"seed": 5, "processes": 1} | change))
    result = job(cli, "out.jsonl", seed=())
    assert result.returncode == 0 and "out.jsonl.part belongs to a different job" in result.stderr


@pytest.mark.parametrize("line", ['{"index": "0"}', '{"index": true}', '{"index": 0, "tokens": 5}'])
def test_the_lines_of_a_job_end_before_a_damaged_line(tmp_path, line):
    path = tmp_path / "out.jsonl"
    path.write_text(f'{{"index": 0}}\n{line}\n{{"index": 2}}\n')
    assert list(lines_file.read(path)) == [{"index": 0}]
