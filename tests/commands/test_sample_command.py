"""`gpt2cli sample`, `interactive` and `evaluate` as commands."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import oracle
import pexpect
import pytest
from conftest import PROMPTS, ROOT, TINY, compiled, golden_models

from gpt2cli.errors import UserError
from gpt2cli.storage import checkpoint, folders
from gpt2cli.text import encoder

T = ("--model_name", "tiny", "--models_dir", TINY.parent)
BANNER = "=" * 40


def jsonl(result):
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_standard_output_is_the_banner_and_the_text_and_nothing_else(cli):
    result = cli("sample", *T, "--length", 20, "--seed", 4, "--nsamples", 2)
    first, second = (f"{BANNER} SAMPLE {n} {BANNER}\n" for n in (1, 2))
    assert result.stdout.startswith(first) and result.stdout.count("= SAMPLE ") == 2
    assert second in result.stdout and "TensorFlow" not in result.stdout
    again = cli("sample", *T, "--length", 20, "--seed", 4, "--nsamples", 2, "--batch_size", 2)
    assert again.stdout == result.stdout


def test_the_real_command_writes_only_samples_to_standard_output(shell):
    """As a process: TensorFlow's native code writes to the file descriptors directly."""
    words = ("sample", *T, "--length", 10, "--format", "jsonl", "--prompt", "-")
    result = shell(*words, input="The import\n")
    (sample,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert sample["prompt"] == "The import" and len(sample["tokens"]) == 10
    assert result.stderr.count("\n") == 2, result.stderr  # the device and the seed
    assert str(sample["seed"]) in result.stderr


def test_every_way_to_give_a_prompt_gives_the_same(cli, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("The import statement\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "The import statement"}\n\n"A class"\n[5, 6]\n')
    rest = (*T, "--length", 12, "--temperature", 0, "--format", "jsonl")
    expected = jsonl(cli("sample", "--prompt", "The import statement", *rest))[0]["text"]
    assert jsonl(cli("sample", "--prompt_file", tmp_path / "p.txt", *rest))[0]["text"] == expected
    assert jsonl(cli("sample", "--prompts", tmp_path / "p.txt", *rest))[0]["text"] == expected
    three = jsonl(cli("sample", "--prompts", tmp_path / "p.jsonl", *rest, "--batch_size", 3))
    assert three[0]["text"] == expected
    assert [s["prompt"] for s in three] == ["The import statement", "A class", [5, 6]]


def test_the_fields_of_jsonl_are_as_documented(cli, tiny):
    (sample,) = jsonl(cli("sample", *T, "--length", 7, "--format", "jsonl", "--seed", 3))
    assert list(sample) == ["index", "prompt", "text", "tokens", "finish_reason", "seed"]
    assert sample["prompt"] is None and sample["seed"] == 3 and sample["finish_reason"] == "length"
    assert tiny.encoder.decode(sample["tokens"]) == sample["text"] and len(sample["tokens"]) == 7


def test_the_number_of_samples_need_not_be_a_multiple_of_the_batch(cli, tmp_path):
    (tmp_path / "p.txt").write_text("One\nTwo\nThree\n")
    samples = jsonl(
        cli("sample", *T, "--prompts", tmp_path / "p.txt", "--nsamples", 3, "--batch_size", 4,
            "--length", 5, "--format", "jsonl")
    )  # fmt: skip
    assert [s["index"] for s in samples] == list(range(9))
    assert [s["prompt"] for s in samples] == ["One"] * 3 + ["Two"] * 3 + ["Three"] * 3


def test_a_stop_text_may_span_two_tokens(tiny):
    (whole,) = tiny.generate("The", length=60, seed=2, temperature=0.8)
    ids = whole.tokens
    for at in (5, 9, 20):
        # the end of one token and the beginning of the next
        before, text = tiny.encoder.decode(ids[:at]), tiny.encoder.decode(ids)
        stop = text[len(before) - 2 : len(before) + 2]
        (cut,) = tiny.generate("The", length=60, seed=2, temperature=0.8, stop=("never", stop))
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert cut.finish_reason == "stop"
        assert tiny.encoder.decode(cut.tokens).startswith(cut.text)
        assert stop in tiny.encoder.decode(cut.tokens)


def test_a_stop_text_before_min_length_does_not_end_a_sample(tiny):
    (whole,) = tiny.generate("The", length=50, seed=2, temperature=0.8)
    stop = tiny.encoder.decode(whole.tokens[2:3])
    (cut,) = tiny.generate("The", length=50, seed=2, temperature=0.8, stop=(stop,), min_length=30)
    assert len(cut.tokens) >= 30 or cut.finish_reason == "length"
    assert cut.text.startswith(tiny.encoder.decode(whole.tokens[:20]))


@pytest.fixture(scope="module")
def chinese(network, tmp_path_factory):
    """`network` with a WordPiece vocabulary of its 97 tokens, all but two of them Chinese."""
    from gpt2cli.inference import generator as inference

    folder = tmp_path_factory.mktemp("chinese")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "。", "，"]
    tokens += [chr(0x4E00 + n) for n in range(97 - len(tokens))]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    sizes = dict(n_vocab=97, n_ctx=24, n_embd=32, n_head=4, n_layer=2, end_token=None)
    (folder / "hparams.json").write_text(json.dumps(sizes))
    return inference.LanguageModel(compiled("lite", network), encoder.of_model(folder))


@pytest.mark.parametrize("least", [0, 1, 20, 60])
def test_stop_with_a_minimal_length_ends_at_the_first_full_stop_after_it(chinese, least):
    """As bert4keras' end_id and minlen: the length counts the token of the stop itself."""
    settings = dict(length=400, temperature=2.0, seed=4, nsamples=6, batch_size=3)
    settings |= dict(min_length=least)
    whole = chinese.generate("一", **settings)
    kept = chinese.generate("一", stop=("。",), keep_stop=True, **settings)
    cut = chinese.generate("一", stop=("。",), **settings)
    # a longer stop text, which never comes, does not bring back one that came too early
    other = chinese.generate("一", stop=("。", "一丁丂七丄丅丆"), **settings)
    earlier = 0
    for free, with_it, without, same in zip(whole, kept, cut, other, strict=True):
        stops = [n for n, token in enumerate(free.tokens, 1) if token == 5 and n >= max(1, least)]
        assert with_it.tokens == without.tokens == same.tokens == free.tokens[: stops[0]]
        assert with_it.text == chinese.encoder.decode(with_it.tokens) == without.text + "。"
        assert same.text == without.text and with_it.finish_reason == "stop"
        earlier += without.text.count("。")
    assert (earlier > 0) == (least > 1)


def test_a_kept_stop_text_is_streamed_and_truncated_too(tiny):
    from gpt2cli.options import GenerateOptions

    settings = dict(length=60, seed=2, temperature=0.8)
    (whole,) = tiny.generate("The", **settings)
    stop = whole.text[30:34]
    end = whole.text.index(stop) + 4
    for cut in (None, whole.text[20:23], whole.text[40:43]):
        both = GenerateOptions(stop=(stop, "never"), keep_stop=True, truncate=cut, **settings)
        *pieces, sample = tiny.stream("The", both)
        expected = whole.text[:end].split(cut)[0] if cut else whole.text[:end]
        assert "".join(pieces) == sample.text == expected


def test_truncate_and_include_prefix_work_alone_and_together(tiny):
    settings = dict(length=40, seed=2, temperature=0.8)
    (whole,) = tiny.generate("The", **settings)
    mark = whole.text[25:28]
    short = whole.text[: whole.text.index(mark)]
    assert tiny.generate("The", truncate=mark, **settings)[0].text == short
    assert tiny.generate("The", include_prefix=True, **settings)[0].text == "The" + whole.text
    both = tiny.generate("The", truncate=mark, include_prefix=True, **settings)
    assert both[0].text == "The" + short


def test_the_end_token_ends_a_sample_and_is_not_printed(tiny):
    samples = tiny.generate(
        [[tiny.encoder.end]] * 1, nsamples=12, batch_size=12, length=600, top_k=5, seed=1
    )
    ended = [s for s in samples if s.finish_reason == "end"]
    assert ended
    for sample in ended:
        assert tiny.encoder.end not in sample.tokens and "endoftext" not in sample.text
        assert len(sample.tokens) < 600


def test_a_streamed_text_is_the_text(tiny):
    from gpt2cli.options import GenerateOptions

    for settings in (dict(), dict(stop=("the", ". ")), dict(truncate="is")):
        settings = GenerateOptions(length=50, seed=6, temperature=0.9, **settings)
        *pieces, sample = tiny.stream("A class", settings)
        (whole,) = tiny.samples(["A class"], settings)
        assert "".join(pieces) == sample.text == whole.text
        assert settings.stop or settings.truncate or len([p for p in pieces if p]) > 5


def test_bytes_outside_utf8_never_break_a_stream(tiny):
    from gpt2cli.options import GenerateOptions

    settings = GenerateOptions(length=80, seed=1, temperature=50.0)  # all but uniform
    *pieces, sample = tiny.stream("x", settings)
    assert "".join(pieces) == sample.text == tiny.encoder.decode(sample.tokens)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """A run folder as `train` writes it, of step 1."""
    folder = tmp_path_factory.mktemp("runs") / "run1"
    network = checkpoint.load(TINY)
    checkpoint.save_run(folder, network, network.weights, {"step": 1, "seed": 1}, {})
    folders.copy_description(TINY, folder)
    return folder


@pytest.fixture
def run1(a_run, workdir):
    """The current folder, with a run of one step in checkpoint/run1."""
    shutil.copytree(a_run, workdir / "checkpoint" / "run1")
    return workdir


def test_samples_of_a_run_are_also_saved_in_its_folder(cli, run1):
    for number in ("", "-2"):
        result = cli("sample", "--run_name", "run1", "--length", 5, "--seed", 9)
        path = run1 / "samples" / "run1" / f"sample-1-seed9{number}.txt"
        assert path.read_text() == result.stdout
    result = cli("sample", "--run_name", "run1", "--length", 5, "--seed", 9, "--stop", "a",
                 "--prompts", "missing.txt")  # fmt: skip
    assert result.returncode == 1 and len(list((run1 / "samples/run1").iterdir())) == 2


def test_an_earlier_checkpoint_can_be_named(cli, run1, tiny):
    for path in (run1 / "checkpoint" / "run1").glob("model-1.*"):
        shutil.copy(path, path.with_name(path.name.replace("model-1", "model-7")))
    words = ("--run_name", "run1", "--length", 5, "--seed", 9)
    assert cli("sample", *words, "--checkpoint", "model-1").returncode == 0
    assert (run1 / "samples/run1/sample-1-seed9.txt").is_file()
    for name, status, said in (
        ("model-3", 1, "has no checkpoint model-3 (found: model-1, model-7)"),
        ("3", 1, "has no checkpoint model-3 (found: model-1, model-7)"),
        ("../run1/model-1", 2, "--checkpoint must be a single name"),
    ):
        result = cli("sample", *words, "--checkpoint", name)
        assert result.returncode == status and said in result.stderr
    (run1 / "text.txt").write_text("The import statement")
    words = ("text.txt", "--run_name", "run1", "--checkpoint", "model-1", "--format", "json")
    assert cli("evaluate", *words).returncode == 0


def test_an_endless_run_is_ended_by_ctrl_c_and_keeps_its_samples(run1):
    command = [sys.executable, "-m", "gpt2cli", "sample", "--run_name", "run1", "--nsamples", "0"]
    command += ["--length", "8", "--format", "jsonl"]
    with subprocess.Popen(
        command, stdout=-1, stderr=-1, text=True, cwd=run1, env={"PYTHONPATH": str(ROOT)}
    ) as process:
        lines = [process.stdout.readline() for _ in range(5)]
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    (path,) = (run1 / "samples" / "run1").iterdir()
    assert path.read_text().startswith("".join(lines)), err  # and perhaps one more
    assert all(json.loads(line) for line in path.read_text().splitlines() + rest.splitlines())
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2, 3, 4]


def test_out_replaces_a_file_and_prints_nothing(cli, run1):
    words = ("sample", "--run_name", "run1", "--length", 5, "--seed", 9, "--nsamples", 2)
    shown = cli(*words, "--sample_dir", "elsewhere").stdout
    path = run1 / "new" / "folder" / "out.txt"
    for _ in range(2):
        result = cli(*words, "--out", path)
        assert result.returncode == 0 and result.stdout == "" and str(path) in result.stderr
        assert path.read_text() == shown
    assert list(path.parent.iterdir()) == [path]
    assert not (run1 / "samples").exists()  # the run's own copy is for samples without --out


def test_an_out_that_cannot_be_written_is_rejected(cli, tmp_path):
    (tmp_path / "file").write_text("")
    words = ("sample", *T, "--length", 2, "--out")
    for path in (tmp_path, tmp_path / "file" / "out.txt"):
        result = cli(*words, path)
        assert result.returncode == 1 and str(path) in result.stderr and result.stdout == ""


def test_several_files_hold_different_samples(cli, tmp_path):
    (tmp_path / "p.txt").write_text("One\nTwo\n")
    words = ("sample", *T, "--length", 5, "--seed", 3, "--prompts", tmp_path / "p.txt")
    whole = jsonl(cli(*words, "--nsamples", 2, "--format", "jsonl", "--nfiles", 1))
    words += ("--nsamples", 2, "--format", "jsonl", "--nfiles", 3, "--out", tmp_path / "o.v1.txt")
    result = cli(*words)
    assert result.returncode == 0 and result.stdout == ""
    texts = []
    for number in (1, 2, 3):
        path = tmp_path / f"o.v1-{number}.txt"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["prompt"] for line in lines] == ["One", "One", "Two", "Two"]
        texts += lines
        assert str(path) in result.stderr
    assert [line["index"] for line in texts] == list(range(12))
    assert [line["tokens"] for line in texts[:4]] == [line["tokens"] for line in whole]
    assert len({tuple(line["tokens"]) for line in texts}) == 12
    assert not (tmp_path / "o.v1.txt").exists()


def test_a_delimiter_follows_each_sample_instead_of_the_banner(cli, tiny, tmp_path):
    flags = (*T, "--length", 8, "--seed", 3, "--nsamples", 2, "--prefix", "The")
    result = cli("sample", *flags, "--delimiter", "=" * 20)
    texts = [s.text for s in tiny.generate("The", length=8, seed=3, nsamples=2)]
    assert result.stdout == "".join(f"{text}\n{'=' * 20}\n" for text in texts)
    cli("sample", *flags, "--delimiter", "", "--out", tmp_path / "o.txt")
    assert (tmp_path / "o.txt").read_text() == "".join(f"{text}\n\n" for text in texts)


def test_jsonl_has_logprobs_if_requested(cli, tiny):
    flags = ("sample", *T, "--length", 6, "--seed", 3, "--prompt", "The", "--format", "jsonl")
    (sample,) = jsonl(cli(*flags, "--logprobs"))
    assert list(sample)[-1] == "logprobs" and len(sample["logprobs"]) == 6
    prompt = tiny.encoder.encode("The")
    logits = tiny.logits(prompt + sample["tokens"][:-1])[len(prompt) - 1 :]
    expected = oracle.log_softmax(logits)[range(6), sample["tokens"]]
    assert sample["logprobs"] == pytest.approx(expected, abs=1e-4)
    assert "logprobs" not in jsonl(cli(*flags))[0]


def test_an_endless_run_keeps_the_file_it_wrote(run1):
    command = [sys.executable, "-m", "gpt2cli", "sample", "--run_name", "run1", "--nsamples", "0"]
    command += ["--length", "8", "--format", "jsonl", "--out", "o.jsonl"]
    with subprocess.Popen(
        command, stdout=-1, stderr=-1, text=True, cwd=run1, env={"PYTHONPATH": str(ROOT)}
    ) as process:
        begin = time.monotonic()
        while not any(p.stat().st_size > 500 for p in run1.glob("o.jsonl.*.part")):
            assert process.poll() is None and time.monotonic() < begin + 120
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "o.jsonl" in err
    lines = (run1 / "o.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(len(lines)))
    assert not list(run1.glob("*.part"))


def test_a_prompt_longer_than_the_window_is_cut_and_reported(cli):
    result = cli("sample", *T, "--prompt", "word and " * 400, "--length", 3)
    assert result.returncode == 0 and "sees only the last 256\n" in result.stderr


def test_the_line_of_a_cut_prompt_says_how_much_the_model_did_not_see(cli, tiny, prompts):
    long, rest = "word and " * 200, ("--length", 2, "--format", "jsonl", "--seed", 1)
    (prompts / "long.txt").write_text(f"The import\n{long}\n")
    count = len(tiny.encoder.encode(long))
    for window, cut in (("half", count - 256), ("last", count - 255)):
        more = (*rest, "--window", window, "--prompts", "long.txt")
        short, marked = jsonl(cli("sample", *T, *more))
        assert "prompt_cut" not in short and marked["prompt_cut"] == cut
        result = cli("sample", *T, *more, "--out", f"{window}.jsonl")
        (said, _) = result.stderr.splitlines()
        seen = count - cut
        assert (
            said
            == f"{window}.jsonl: prompt 2 has {count} tokens; the model sees only the last {seen}"
        )
        found = [
            json.loads(line) for line in (prompts / f"{window}.jsonl").read_text().splitlines()
        ]
        assert found == [short, marked]
        assert tiny.generate(long, length=1, window=window)[0].prompt_cut == cut
    assert tiny.generate("The", length=300)[0].prompt_cut == 0  # the window slides later
    assert tiny.generate([5] * 257, length=1, beams=2)[0].prompt_cut == 1


def test_special_decides_whether_a_prompt_contains_a_token(cli, tiny, prompts):
    text, end = "One<|endoftext|>two", tiny.encoder.end
    as_text = tiny.check_prompt(text)
    assert end not in as_text and tiny.check_prompt(text, True).count(end) == 1
    rest = ("--length", 8, "--temperature", 0, "--format", "jsonl")
    (prompts / "p.txt").write_text(f"{text}\n")
    for flags, special in (((), "text"), (("--special", "token"), "token")):
        ids = tiny.check_prompt(text, special == "token")
        (expected,) = tiny.generate([ids], length=8, temperature=0)
        assert (
            tiny.generate(text, length=8, temperature=0, special=special)[0].text == expected.text
        )
        for source in (("--prompt", text), ("--prompts", "p.txt")):
            result = cli("sample", *T, *source, *rest, *flags)
            (found,) = jsonl(result)
            assert found["tokens"] == expected.tokens and found["prompt"] == text
            assert ("is read as plain text; add --special token" in result.stderr) == (not flags)
        result = cli("sample", *T, "--prompts", "p.txt", *rest, *flags, "--out", f"{special}.jsonl")
        assert json.loads((prompts / f"{special}.jsonl").read_text())["tokens"] == expected.tokens
        assert ("<|endoftext|> in a prompt is read" in result.stderr) == (not flags)
        shown = cli("sample", *T, "--prompt", text, *rest, *flags, "--include_prefix")
        assert json.loads(shown.stdout)["text"] == text + expected.text


def test_a_job_is_not_resumed_with_another_meaning_of_special(cli, prompts, monkeypatch):
    from gpt2cli.inference.generator import LanguageModel

    words = ("sample", *T, "--prompts", "prompts.txt", "--length", 2, "--format", "jsonl")
    words += ("--seed", 1, "--out", "out.jsonl")
    real, calls = LanguageModel.answers, []

    def answers(self, *arguments, **more):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *arguments, **more)

    monkeypatch.setattr(LanguageModel, "answers", answers)
    assert cli(*words).returncode == 130
    result = cli(*words, "--special", "token")
    assert "out.jsonl.part belongs to a different job; moved to out.jsonl.part.old" in result.stderr


def test_flags_without_an_effect_are_named(cli, monkeypatch):
    import io

    result = cli("sample", *T, "--beams", 2, "--batch_size", 3, "--length", 2)
    assert result.returncode == 0 and "--batch_size has no effect with --beams" in result.stderr
    typed = "/set batch_size 4\n/set logprobs true\n/set keep_stop true\n/show\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    result = cli("interactive", *T, "--batch_size", 3, "--logprobs")
    assert result.returncode == 0
    for line in (
        "--batch_size has no effect here: one sample is generated at a time",
        "--logprobs has no effect here: only sample --format jsonl prints log-probabilities",
        "--keep_stop needs --stop TEXT",
    ):
        assert line in result.stderr
    assert result.stderr.count("batch_size has no effect here") == 2
    assert "batch_size = 3" in result.stderr and "keep_stop = False" in result.stderr


def test_any_of_the_models_end_tokens_ends_a_sample(cli, tiny, monkeypatch):
    """A newline too, which stays a newline everywhere else."""
    (newline,) = tiny.encoder.encode("\n")
    settings = dict(length=80, seed=3, temperature=0.8, include_prefix=True)
    (free,) = tiny.generate("The\nclass", **settings)
    at = free.tokens.index(newline)
    monkeypatch.setattr(tiny.encoder, "ends", (newline, tiny.encoder.end))
    (ended,) = tiny.generate("The\nclass", **settings)
    assert ended.finish_reason == "end" and ended.tokens == free.tokens[:at] and at > 0
    assert ended.text == "The\nclass" + tiny.encoder.decode(free.tokens[:at])
    assert len(tiny.generate("The\nclass", min_length=at + 5, **settings)[0].tokens) >= at + 5
    words = ("sample", *T, "--prompt", "The\nclass", "--length", 80, "--seed", 3)
    (found,) = jsonl(cli(*words, "--temperature", 0.8, "--format", "jsonl"))
    assert found["finish_reason"] == "end" and found["tokens"] == ended.tokens


def test_interactive_gives_advice_once_and_special_can_be_set(cli, monkeypatch):
    import io

    text = "One<|endoftext|>two\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{text}{text}/set special token\n{text}"))
    result = cli("interactive", *T, "--length", 3, "--seed", 1)
    assert result.returncode == 0
    assert result.stderr.count("<|endoftext|> in a prompt is read as plain text") == 1


def test_a_typed_start_token_is_the_one_before_every_prompt(chinese):
    settings = dict(length=10, temperature=0, include_prefix=True)
    (plain,) = chinese.generate("一丁", **settings)
    for special in ("text", "token"):
        (typed,) = chinese.generate("[CLS]一丁", special=special, **settings)
        assert typed.tokens == plain.tokens and typed.text == f"[CLS]{plain.text}"


def test_a_space_at_the_end_of_a_prompt_is_mentioned_on_a_terminal_only(cli, monkeypatch):
    words = ("sample", *T, "--prompt", "The ", "--length", 2)
    assert "ends in a space" not in cli(*words).stderr
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    result = cli(*words)
    assert result.stderr.count("the prompt ends in a space. ") == 1 and result.returncode == 0
    assert "ends in a space" not in cli(*words[:-4], "--prompt", "The", "--length", 2).stderr


@pytest.mark.parametrize(
    "flags", [(), ("--beams", 2), ("--stop", "x"), ("--format", "jsonl", "--out", "out.jsonl")]
)
def test_each_prompt_is_encoded_once(cli, tiny, monkeypatch, prompts, flags):
    encoded = []
    real = tiny.encoder.encode

    def encode(text, special=False):
        encoded.append(text)
        return real(text, special)

    monkeypatch.setattr(tiny.encoder, "encode", encode)
    words = ("sample", *T, "--length", 3, "--prompts", "prompts.txt")
    assert cli(*words, *flags).returncode == 0
    assert encoded == PROMPTS


def test_a_bad_prompt_is_rejected_by_line(cli, tmp_path):
    for name, content, words in (
        ("missing.txt", None, "missing.txt"),
        ("empty.txt", b"", "no prompt"),
        ("latin1.txt", "café".encode("latin-1"), "byte 3 is not utf-8 text"),
        ("bad.jsonl", b'"fine"\n{"prompt": 5}\n', "line 2"),
        ("broken.jsonl", b"{", "line 1"),
        ("ids.jsonl", b"[1, 99999]\n", "99999"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        result = cli("sample", *T, "--prompts", tmp_path / name, "--length", 2)
        assert result.returncode == 1 and words in result.stderr, (name, result)
        assert result.stdout == ""


def test_a_missing_model_or_run_is_rejected_with_a_list_of_the_others(cli, workdir):
    result = cli("sample", "--model_name", "124M")
    assert result.returncode == 1
    assert "tiny" in result.stderr and "gpt2cli download 124M" in result.stderr
    result = cli("sample", "--run_name", "none")
    assert result.returncode == 1 and "gpt2cli train" in result.stderr


def test_evaluate_is_the_mean_over_windows_that_overlap_by_one_token(cli, tiny, tmp_path):
    ids = np.random.default_rng(0).integers(2048, size=700)
    np.savez(tmp_path / "ids.npz", ids)
    result = cli("evaluate", tmp_path / "ids.npz", *T, "--format", "json", "--batch_size", 2)
    found = json.loads(result.stdout)
    weights = {n: v.numpy() for n, v in checkpoint.load(TINY).weights.items()}
    total = 0.0
    for start in range(0, 699, 256):
        window = ids[start : start + 257]
        total += oracle.loss(weights, 5, window) * (len(window) - 1)
    assert found["tokens"] == 699
    assert found["loss"] == pytest.approx(total / 699, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    line = cli("evaluate", tmp_path / "ids.npz", *T, "--batch_size", 2).stdout
    assert line.split()[:2] == ["loss", f"{found['loss']:.6f}"] and line.endswith("tokens 699\n")


def test_logits_accept_at_most_one_window(tiny):
    assert tiny.logits([1, 2, 3]).shape == (3, 2048)
    assert tiny.logits(tiny.encoder.encode("import")).dtype == np.float32
    with pytest.raises(UserError, match="256"):
        tiny.logits([1] * 257)
    with pytest.raises(UserError, match="5000"):
        tiny.logits([5000])
    with pytest.raises(UserError, match="temperatur"):
        tiny.generate("x", temperatur=1)


@pytest.mark.parametrize("folder", golden_models("gpt2-openai"))
def test_the_commands_reproduce_the_numbers_of_the_original_program(cli, tmp_path, folder):
    source = ("--models_dir", folder.parent, "--model_name", folder.name)
    expected = np.load(folder / "expected.npz")
    last = int(expected["n_seq"]) - 1
    np.savez(tmp_path / "ids.npz", expected[f"seq{last}_tokens"])
    result = cli("evaluate", tmp_path / "ids.npz", *source, "--format", "json")
    assert json.loads(result.stdout)["loss"] == pytest.approx(
        float(expected[f"seq{last}_loss"]), abs=1e-5
    )
    count = int(expected["n_greedy"])
    prompts = [json.dumps(expected[f"greedy{j}_prompt"].tolist()) for j in range(count)]
    (tmp_path / "p.jsonl").write_text("\n".join(prompts))
    samples = jsonl(
        cli("sample", *source, "--prompts", tmp_path / "p.jsonl", "--temperature", 0,
            "--length", 64, "--format", "jsonl")
    )  # fmt: skip
    assert len(samples) == count >= 2
    for j, sample in enumerate(samples):
        assert sample["tokens"] == expected[f"greedy{j}_ids"].tolist()


def session(*words):
    """An `interactive` on a terminal of its own, at its first prompt."""
    child = pexpect.spawn(
        sys.executable,
        ["-m", "gpt2cli", "interactive", *map(str, T), *map(str, words)],
        cwd=str(ROOT),
        env={**__import__("os").environ, "PYTHONPATH": str(ROOT), "HOME": "/nonexistent"},
        encoding="utf-8",
        timeout=120,
    )
    child.expect(">>> ")
    return child


def test_an_interactive_session(cli):
    """One session: a sample, settings, several lines, Ctrl-C stops the sample only, EOF leaves."""
    child = session("--length", 12, "--temperature", 0)
    expected = json.loads(
        cli("sample", *T, "--prompt", "The import", "--length", 12, "--temperature", 0,
            "--format", "jsonl").stdout
    )["text"]  # fmt: skip
    child.sendline("The import")
    child.expect(">>> ")
    shown = child.before.split("The import", 1)[1].replace("\r\n", "\n").strip("\n")
    assert expected.strip("\n") in shown
    child.sendline("/set temperature hot")
    child.expect("--temperature takes float")
    child.expect(">>> ")
    child.sendline("/set top_p=2")
    child.expect("--top_p must be at most 1")
    child.expect(">>> ")
    child.sendline("/set topp 0.5")
    child.expect("unknown setting 'topp'; the settings are length, ")
    child.expect(">>> ")
    child.sendline("/set length 5")
    child.expect(">>> ")
    child.sendline("/show")
    child.expect("length = 5")
    child.expect("temperature = 0.0")
    child.expect(">>> ")
    child.sendline("/set temperature")
    child.expect(">>> ")
    child.sendline("/show")
    child.expect("temperature = 1.0")
    child.expect(">>> ")
    child.sendline("/set temperature 0")  # a greedy text does not end by itself
    child.expect(">>> ")
    child.sendline('"""')
    child.expect(r"\.\.\. ")
    child.sendline("first line")
    child.expect(r"\.\.\. ")
    child.sendline("second line")
    child.expect(r"\.\.\. ")
    child.sendline('"""')
    child.expect(">>> ")
    child.sendline("/set length 100000")
    child.expect(">>> ")
    child.sendline("A long one")
    time.sleep(2)
    child.sendintr()
    child.expect("stopped")
    child.expect(">>> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_interactive_shows_no_marks_in_a_pipe(shell):
    result = shell("interactive", *T, "--length", 4, "--seed", 1, input="One\n\n/quit\nTwo\n")
    assert result.returncode == 0 and ">>>" not in result.stdout
    assert result.stdout.strip() and "Traceback" not in result.stderr
