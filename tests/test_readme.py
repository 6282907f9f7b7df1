"""What README says of commands, flags and files is what the program has."""

import dataclasses
import re
import runpy

import pytest
from conftest import ROOT

from gpt2cli import cli, flags

README = (ROOT / "README.md").read_text(encoding="utf-8")


def flag_table():
    """The table of all flags as README must have it: one row a flag and meaning."""
    rows = {}
    for command, (config_class, _) in cli.COMMANDS.items():
        for name, (hint, default, text) in flags.fields_of(config_class).items():
            kind = flags.describe_type(hint).replace("|", " or ")
            shown = cli.describe_default(default).removeprefix(" (default: ").strip(" ()")
            rows.setdefault((name, kind, shown, text.replace("|", "\\|")), []).append(command)
    lines = ["| flag | takes | default | of | meaning |", "| --- | --- | --- | --- | --- |"]
    for (name, kind, shown, text), commands in rows.items():
        of = "all" if len(commands) == len(cli.COMMANDS) else ", ".join(commands)
        lines.append(f"| `--{flags.spelled(name)}` | {kind} | {shown} | {of} | {text} |")
    return "\n".join(lines)


def test_the_table_of_flags_is_the_programs():
    table = re.search(r"^\| flag \|.*?(?=\n\n)", README, re.M | re.S)
    assert table and table[0] == flag_table(), f"README needs this table:\n{flag_table()}"


def test_every_command_is_listed_with_its_summary():
    listed = re.findall(r"^\| `gpt2cli (\w+)[^`]*` \| (.*) \|$", README, re.M)
    assert [name for name, _ in listed] == list(cli.COMMANDS)


def test_every_command_line_in_the_readme_is_accepted(monkeypatch):
    """Blocks of ```sh: each line that begins with gpt2cli is read, none is run."""
    for name, value in (("ID", "1"), ("MIN", "0"), ("MAX", "7"), ("COUNT", "8")):  # as Slurm does
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [line.split("|")[-1].strip() if "| gpt2cli" in line else line for line in lines]
    lines = [re.split(r" [#>]|&&", line)[0] for line in lines if line.startswith("gpt2cli ")]
    assert len(lines) >= 8
    import shlex

    for line in lines:
        made = cli.read_command_line(shlex.split(line)[1:])
        assert made is None or dataclasses.is_dataclass(made), line


def test_the_map_of_the_code_names_every_module():
    modules = sorted(p.name for p in (ROOT / "gpt2cli").glob("[a-z]*.py"))
    for name in modules:
        assert f"`{name}`" in README, name


@pytest.mark.parametrize("name", ["bin/quickstart", "bin/test", "models/make_tiny.py"])
def test_files_that_the_readme_names_are_there(name):
    assert name in README and (ROOT / name).is_file()


def test_the_python_example_runs(workdir, capsys):
    import numpy as np

    block = re.search(r"^```python\n(.*?)^```", README, re.M | re.S)[1]
    (workdir / "data").mkdir()
    np.savez(workdir / "data" / "books.npz", np.arange(2000) % 2048)
    exec(compile(block, "README.md", "exec"), {})
    assert "(" in capsys.readouterr().out
    assert (workdir / "checkpoint" / "notebook" / "model-10.index").exists()


def test_the_tables_of_scaling_are_the_scripts(capsys):
    path = ROOT / "benchmarks" / "scaling.py"
    script = runpy.run_path(str(path))
    script["table"]()
    *lines, apart = capsys.readouterr().out.strip().splitlines()
    text = (ROOT / "docs" / "SCALING.md").read_text(encoding="utf-8")
    assert len(lines) > 12 and not [line for line in lines if line not in text]
    assert float(apart.split()[-2]) < 2
