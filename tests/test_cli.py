"""The command line itself: flags, help, refusals. Nothing here starts any work."""

import dataclasses
import sys

import pytest

from gpt2cli import cli as command_line
from gpt2cli import flags, peers
from gpt2cli.commands.sample import SampleOptions
from gpt2cli.errors import UsageError


def read(*words):
    return command_line.read_command_line(list(words))


def test_help_and_refusals_come_without_tensorflow(shell, tmp_path):
    """As processes, with an import of TensorFlow that would fail loudly."""
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    environment = {"PYTHONPATH": f"{tmp_path}:{command_line.__file__.rsplit('/', 2)[0]}"}
    for words, status in (
        (["--help"], 0),
        ([], 0),
        (["download", "--help"], 0),
        (["train", "-h"], 0),
        (["download"], 0),
        (["sample", "--promt", "x"], 2),
        (["smaple"], 2),
        (["train"], 2),
        (["train", "nothing-here.txt"], 1),
        (["sample", "--model_name", "none-such"], 1),
        (["sample", "--run_name", "../x"], 2),
        (["evaluate", "none.txt", "--model_name", "none-such"], 1),
    ):
        result = shell(*words, env=environment, cwd=tmp_path)
        assert result.returncode == status, (words, result)
        assert "Traceback" not in result.stderr
        assert bool(result.stdout) == (status == 0), words
        assert bool(result.stderr) == (status != 0), words


@pytest.mark.parametrize("command", command_line.COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_works_anywhere_and_names_every_flag(cli, command, flag):
    result = cli(command, "--verbose", flag)
    assert result.returncode == 0 and result.stderr == ""
    options_class = command_line.options_class(command)
    fields = dataclasses.fields(options_class)
    assert fields
    for field in fields:
        assert f"--{flags.spelled(field.name)} " in result.stdout
    assert all(text for _, _, text in flags.fields_of(options_class).values())
    assert "Examples:" in result.stdout and f"  gpt2cli {command}" in result.stdout


def test_general_help_names_every_command(cli):
    for words in ([], ["--help"], ["-h"], ["help"]):
        result = cli(*words)
        assert result.returncode == 0
        assert all(f"  {name} " in result.stdout for name in command_line.COMMANDS)


def test_a_misspelt_flag_is_refused_with_the_nearest_name(cli):
    result = cli("train", "data.txt", "--learning_rat=1")
    assert result.returncode == 2 and result.stdout == ""
    assert "--learning_rat" in result.stderr and "--learning_rate?" in result.stderr


@pytest.mark.parametrize(
    "word, command",
    [
        ("generate_unconditional_samples", "sample"),
        ("src/interactive_conditional_samples.py", "interactive"),
        ("encode.py", "encode"),
        ("./train.py", "train"),
        ("train-horovod.py", "train"),
        ("download_model.py", "download"),
        ("finetune", "train"),
        ("generate", "sample"),
        ("run_clm.py", "train"),
    ],
)
def test_the_name_of_another_programs_script_gets_our_command(word, command):
    with pytest.raises(UsageError, match=rf"unknown command .*\(here it is gpt2cli {command}\)"):
        read(word, "--model_name", "117M")


@pytest.mark.parametrize(
    "command, flag, ours",
    [
        ("sample", "max_length", "length"),
        ("sample", "num_return_sequences", "nsamples"),
        ("sample", "model", "model_name"),
        ("train", "gradient_accumulation_steps", "accumulate_gradients"),
        ("train", "output_dir", "run_name"),
        ("train", "twremat", "memory_saving_gradients"),
        ("encode", "out_path", "out_npz"),
    ],
)
def test_another_programs_flag_gets_ours(command, flag, ours):
    with pytest.raises(UsageError, match=rf"no flag --{flag} \(here it is --{ours}\)"):
        read(command, f"--{flag}", "3")


def test_every_hint_names_a_command_or_flag_of_ours():
    assert set(peers.COMMANDS.values()) <= set(command_line.COMMANDS)
    assert not set(peers.COMMANDS) & set(command_line.COMMANDS)
    fields = {
        flags.spelled(name)
        for command in command_line.COMMANDS
        for name in flags.fields_of(command_line.options_class(command))
    }
    assert {ours for several in peers.FLAGS.values() for ours in several} <= fields


def test_a_text_of_several_words_needs_quotes():
    with pytest.raises(UsageError, match="unexpected argument 'upon': put a text .* in quotes"):
        read("sample", "Once", "upon")
    with pytest.raises(
        UsageError, match="unexpected argument 'Once': to continue one text, use gpt2cli sample"
    ):
        read("interactive", "Once")


def test_a_missing_argument_is_shown_in_its_place():
    usage = r"encode needs --out_npz. Usage: gpt2cli encode IN_TEXT OUT_NPZ \[FLAGS\]; see"
    with pytest.raises(UsageError, match=usage):
        read("encode", "list.json")


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world",
        "2019",
        "None",
        "[a, b]",
        "{response}",
        "007",
        "1e5",
        "True",
        "'quoted'",
        "x=1",
    ]
    + ["- a list", "--", " ", "", "\\n", "'", '"', "日本語", "a b c", "(1,)", "-h"],
)
def test_text_stays_text(text):
    assert read("sample", f"--prompt={text}").prompt == text
    assert read("sample", f"--stop={text or 'x'}").stop == (text or "x",)
    if text != "-h" and not text.startswith("--"):
        assert read("sample", "--prompt", text).prompt == text


def test_names_that_look_like_numbers_stay_names():
    assert read("train", "d.txt", "--run_name=01").run_name == "01"
    assert read("sample", "--model_name", "124").model_name == "124"


def test_a_flag_may_be_given_several_times_only_where_that_has_a_meaning(cli):
    assert read("sample", "--stop", "a", "--stop", "b, c").stop == ("a", "b, c")
    result = cli("sample", "--length", "3", "--length", "4")
    assert result.returncode == 2 and "2 times" in result.stderr


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--include_prefix"], True),
        (["--include_prefix=true"], True),
        (["--include_prefix", "true"], True),
        (["--include_prefix=false"], False),
        (["--include_prefix", "no"], False),
        (["--include_prefix=0"], False),
        (["--noinclude_prefix"], False),
        (["--include-prefix"], True),
        (["--include_prefix", "--length", "5"], True),
    ],
)
def test_switches_take_the_words_that_people_type(words, value):
    assert read("sample", *words).include_prefix is value


def test_positions_and_flags_mean_the_same():
    assert read("encode", "a.txt", "b.npz") == read(
        "encode", "--out_npz=b.npz", "--in_text", "a.txt"
    )
    assert read("encode", "--in_text", "a.txt", "b.npz").out_npz == "b.npz"
    assert read("train", "--dataset", "d").dataset == read("train", "d").dataset == "d"


def test_numbers_are_read_as_their_type():
    made = read("sample", "--top_k", "40", "--top_p", "0.9", "--temperature", "1", "--seed", "7")
    assert (made.top_k, made.top_p, made.temperature, made.seed) == (40, 0.9, 1.0, 7)
    assert read("train", "d", "--learning_rate", "2e-5").learning_rate == 0.00002


NONSENSE = [
    ("sample", "--temperature", "-1"),
    ("sample", "--temperature", "hot"),
    ("sample", "--temperature", "nan"),
    ("sample", "--temperature", "inf"),
    ("sample", "--top_k", "-1"),
    ("sample", "--top_k", "1.5"),
    ("sample", "--top_p", "1.01"),
    ("sample", "--top_p", "-0.1"),
    ("sample", "--length", "0"),
    ("sample", "--length", "many"),
    ("sample", "--nsamples", "-1"),
    ("sample", "--batch_size", "0"),
    ("sample", "--seed", "-1"),
    ("sample", "--seed", str(2**63)),
    ("sample", "--stop", ""),
    ("sample", "--truncate", ""),
    ("sample", "--min_length", "9", "--length", "8"),
    ("sample", "--repetition_penalty", "0"),
    ("sample", "--format", "xml"),
    ("sample", "--precision", "float8"),
    ("sample", "--length"),
    ("sample", "--include_prefix=maybe"),
    ("sample", "--noprompt"),
    ("sample", "--length", "3000000000"),
    ("sample", "--top_p", "1e-300"),
    ("sample", "--temperature", "1e300"),
    ("sample", "--batch_size", "9" * 20),
    ("sample", "--nsamples", "9" * 20),
    ("sample", "--processes", "9" * 20, "--prompts", "p", "--out", "o", "--format", "jsonl"),
    ("sample", "--nfiles", "9" * 20, "--out", "o"),
    ("sample", "--keep_stop"),
    ("sample", "--length_penalty", "2"),
    ("sample", "--logprobs"),
    ("sample", "--sample_dir", "elsewhere"),
    ("sample", "--sample_dir", "elsewhere", "--run_name", "a", "--out", "b"),
    ("sample", "--special", "yes"),
    ("interactive", "--keep_stop"),
    ("evaluate", "--dataset", ""),
    ("train", "--dataset", ""),
    ("train", "d", "--val_dataset", "", "--val_every", "1"),
    ("train", "d", "--run_name", "r\\1"),
    ("encode", "a.txt", "b.npz", "--encoding", "undefined"),
    ("sample", "--prompt", "a", "--prompts", "b"),
    ("sample", "--run_name", "a", "--model_name", "b"),
    ("sample", "--run_name", "a/b"),
    ("sample", "--run_name", ".."),
    ("sample", "--run_name", ""),
    ("sample", "--model_name", "/etc"),
    ("sample", "a text", "extra"),
    ("train",),
    ("train", "d", "--steps", "-5"),
    ("train", "d", "--learning_rate", "0"),
    ("train", "d", "--learning_rate", "fast"),
    ("train", "d", "--optimizer", "adamm"),
    ("train", "d", "--noise", "2"),
    ("train", "d", "--accumulate_gradients", "0"),
    ("train", "d", "--lr_schedule", "linear"),
    ("train", "d", "--lr_schedule", "cosine", "--steps", "5", "--warmup_steps", "5"),
    ("train", "d", "--val_every", "5"),
    ("train", "d", "--run_name", "../x"),
    ("train", "d", "--save_every", "0"),
    ("train", "d", "--encoding", "klingon"),
    ("train", "d", "--combine", "0"),
    ("encode", "a.txt"),
    ("encode", "a.txt", "b.txt"),
    ("encode", "a.txt", "b.npz", "c"),
    ("encode", "a.txt", "b.npz", "--errors", "ignore"),
    ("evaluate",),
    ("evaluate", "d", "--batch_size", "0"),
    ("download", "124M", "--url", "ftp://x"),
    ("download", "../124M"),
    ("interactive", "--nsamples", "0"),
    ("nonsense",),
]


@pytest.mark.parametrize("words", NONSENSE, ids=" ".join)
def test_nonsense_is_a_usage_error_in_the_flags_own_words(cli, words):
    result = cli(*words)
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert result.stderr.startswith("gpt2cli: ") and result.stderr.count("\n") == 1
    flag = next((w.split("=")[0].strip("-") for w in words if w.startswith("--")), "")
    if flag and flag not in ("prompt", "noprompt"):
        assert flag.split("_")[0] in result.stderr


def test_the_dataclass_refuses_in_python_what_the_command_line_refuses():

    for changes in ({"top_p": 2.0}, {"length": "ten"}, {"temperature": True}, {"stop": (1,)}):
        with pytest.raises(UsageError):
            SampleOptions(**changes)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SampleOptions().length = 5


def test_nothing_of_fire_shows_in_the_output(cli):
    """Fire prints what a function returns; ours returns nothing and prints nothing."""
    assert cli("--version").stdout.startswith("gpt2cli ")
    command_line.read_command_line(["sample", "--length", "5"])
    assert cli("--version").stdout.count("\n") == 1


def test_an_unexpected_exception_keeps_its_traceback(monkeypatch):
    def broken(config):
        raise ZeroDivisionError

    from gpt2cli.commands import evaluate

    monkeypatch.setattr(evaluate, "run", broken)
    with pytest.raises(ZeroDivisionError):
        command_line.main(["evaluate", "x"])


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    import subprocess

    from conftest import ROOT

    command = f"{sys.executable} -m gpt2cli --help | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in result.stderr


def test_a_closed_stream_is_not_an_error_unless_the_result_goes_there(tmp_path):
    import subprocess

    from conftest import ROOT

    for redirect in ("<&-", "2>&-", "<&- 2>&-"):
        command = f"{sys.executable} -m gpt2cli --help {redirect}"
        result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0 and result.stderr == "", (redirect, result)
    command = f"{sys.executable} -m gpt2cli --help >&-"  # the result, which is lost
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "gpt2cli: standard output: Bad file descriptor\n"


def test_a_full_standard_output_is_one_line(tmp_path):
    import subprocess

    from conftest import ROOT

    command = f"{sys.executable} -m gpt2cli --help > /dev/full"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result


def test_a_path_that_cannot_be_read_or_is_too_long_is_one_line(cli):
    result = cli("evaluate", "x" * 300, "--model_name", "tiny")
    assert result.returncode == 1 and "too long" in result.stderr, result
    result = cli("sample", "--run_name", "x" * 300)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result


def test_running_out_of_memory_names_the_flags_that_help(cli, monkeypatch):
    from gpt2cli.commands import evaluate

    def greedy(config):
        raise MemoryError

    monkeypatch.setattr(evaluate, "run", greedy)
    result = cli("evaluate", "x")
    assert result.returncode == 1 and "--batch_size" in result.stderr


@pytest.mark.parametrize("width", [50, 80, 140])
def test_help_wraps_at_the_width_of_the_terminal(cli, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = cli("train", "--help").stdout.partition("Examples:")[0].splitlines()
    texts = [line for line in lines if line.startswith("      ")]
    assert len(texts) > 50 and width - 20 < max(map(len, texts)) <= width


def test_every_flag_is_in_one_section_and_common_ones_come_last():
    for command in command_line.COMMANDS:
        cls = command_line.options_class(command)
        sections = flags.sections_of(cls)
        placed = [name for names in sections.values() for name in names]
        assert sorted(placed) == sorted(field.name for field in dataclasses.fields(cls)), command
        assert list(sections)[-1] in ("Folders and messages", "Messages"), command
