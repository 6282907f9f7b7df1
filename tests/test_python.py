"""The commands as Python functions: signatures, help, messages, and the stub for editors."""

import dataclasses
import inspect
import subprocess
import sys

import pytest
from conftest import ROOT

import gpt2cli
from gpt2cli import cli, flags


def test_the_stub_and_the_reference_are_current():
    command = [sys.executable, "bin/generate", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", gpt2cli.FUNCTIONS)
def test_a_function_has_every_setting_with_type_default_and_help(name):
    function = getattr(gpt2cli, name)
    parameters = inspect.signature(function).parameters
    fields = flags.fields_of(cli.options_class(name))
    assert set(parameters) == set(fields) and len(fields) > 3
    for field, flag in fields.items():
        assert parameters[field].annotation == flag.hint
        required = flag.default is dataclasses.MISSING
        assert parameters[field].default == (inspect.Parameter.empty if required else flag.default)
        assert f"    {field}: " in function.__doc__


def test_editors_find_every_public_name():
    assert set(gpt2cli.__all__) <= set(dir(gpt2cli))
    assert {"UserError", "train", "load_model"} <= set(gpt2cli.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        gpt2cli.trian  # noqa: B018


def test_the_dataset_may_be_positional(workdir):
    (workdir / "a.txt").write_text("The kettle clicked off at half past six.\n")
    gpt2cli.encode("a.txt", "a.npz", model_name="tiny")
    assert (workdir / "a.npz").is_file()


def test_a_wrong_setting_gets_the_nearest_name():
    with pytest.raises(gpt2cli.UsageError, match=r"no setting 'learning_rat' .*learning_rate\?"):
        gpt2cli.train("a.txt", learning_rat=1)
    with pytest.raises(gpt2cli.UsageError, match="dataset"):
        gpt2cli.train()


def test_messages_name_settings_as_python_does(workdir):
    with pytest.raises(gpt2cli.UsageError, match=r"^top_p must be at most 1, got 3"):
        gpt2cli.train("a.txt", top_p=3)
    with pytest.raises(gpt2cli.UserError, match="another folder with models_dir"):
        gpt2cli.encode("a.txt", "a.npz", model_name="none-such")


def test_evaluate_returns_its_numbers(workdir, capsys):
    (workdir / "a.txt").write_text("The import statement combines two operations.\n" * 3)
    found = gpt2cli.evaluate("a.txt", model_name="tiny")
    assert set(found) == {"loss", "perplexity", "accuracy", "tokens"} and found["tokens"] > 5
    assert f"loss {found['loss']:.6f} nats/token" in capsys.readouterr().out


def test_generate_names_a_wrong_setting_as_python_does(tiny):
    with pytest.raises(gpt2cli.UsageError, match=r"'lenght' \(did you mean length\?\)"):
        tiny.generate("The", lenght=3)
    with pytest.raises(gpt2cli.UsageError, match="^top_p must be at most 1"):
        tiny.generate("The", top_p=2)


def test_paths_and_commands_in_messages_keep_their_dashes(tmp_path):
    (tmp_path / "a--b").mkdir()
    with pytest.raises(gpt2cli.UserError, match="a--b: it needs encoder.json"):
        gpt2cli.load_encoder(tmp_path / "a--b")
    with pytest.raises(gpt2cli.UserError, match="gpt2cli train --dataset FILE --run_name nope"):
        gpt2cli.sample(run_name="nope", checkpoint_dir=tmp_path)
