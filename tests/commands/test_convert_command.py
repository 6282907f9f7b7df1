"""`gpt2cli convert` as a command."""

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT, TINY

import gpt2cli
from gpt2cli.commands import convert
from gpt2cli.commands.convert import ConvertOptions
from gpt2cli.errors import UserError


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """models/tiny in Hugging Face format."""
    folder = tmp_path_factory.mktemp("convert") / "tiny-hf"
    convert.run(ConvertOptions(src=str(TINY), dst=str(folder), to="hf"))
    return folder


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_model_converts_to_hugging_face_format_and_back(cli, hf, tmp_path, tiny):
    assert names(hf) == [
        *("config.json", "generation_config.json", "merges.txt", "model.safetensors"),
        *("special_tokens_map.json", "tokenizer_config.json", "vocab.json"),
    ]
    result = cli("convert", hf, tmp_path / "tiny")
    assert result.returncode == 0 and result.stdout == ""
    read, wrote = result.stderr.splitlines()
    assert read.startswith(f"read {hf}, a Hugging Face model: 4 layers, 5 heads, 160 wide, 2,048 t")
    assert "parameters, a vocabulary of 2,048" in read
    assert wrote == f"wrote {tmp_path / 'tiny'}; its logits equal those of {hf} exactly"
    kept = {"special_tokens_map.json", "tokenizer_config.json"}  # of the Hugging Face folder
    assert set(names(tmp_path / "tiny")) == {*names(TINY), *kept}
    for name in ("encoder.json", "vocab.bpe", "model.ckpt.data-00000-of-00001"):
        assert (tmp_path / "tiny" / name).read_bytes() == (TINY / name).read_bytes()
    model = gpt2cli.load_model(tmp_path / "tiny")
    np.testing.assert_array_equal(model.logits([5, 77]), tiny.logits([5, 77]))
    assert model.encoder.encode("The import") == tiny.encoder.encode("The import")


def test_the_error_for_a_folder_in_another_format_names_convert(cli, hf):
    used = cli("sample", "--models_dir", hf.parent, "--model_name", hf.name)
    assert used.returncode == 1
    assert "in another format (model.safetensors)" in used.stderr
    assert f"gpt2cli convert {hf} NEW_FOLDER" in used.stderr


def test_an_adapter_is_merged_into_a_model_folder(cli, tmp_path, tiny):
    adapter, place = tmp_path / "adapter", "base_model.model.transformer.h.0.attn.c_attn"
    adapter.mkdir()
    values = {"peft_type": "LORA", "base_model_name_or_path": "me/tiny", "r": 1, "lora_alpha": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    pair = {
        f"{place}.lora_A.weight": np.ones((1, 160)),
        f"{place}.lora_B.weight": np.ones((480, 1)),
    }
    pair = {name: value.astype(np.float32) for name, value in pair.items()}
    safetensors.numpy.save_file(pair, adapter / "adapter_model.safetensors")
    alone = cli("convert", adapter, tmp_path / "out")
    assert alone.returncode == 1 and not (tmp_path / "out").exists()
    assert "LoRA adapter for me/tiny (adapter_config.json)" in alone.stderr
    assert f"gpt2cli convert {adapter} DST --base FOLDER" in alone.stderr
    used = cli("sample", "--models_dir", tmp_path, "--model_name", "adapter")
    assert used.returncode == 1 and "not a model but an adapter" in used.stderr
    result = cli("convert", adapter, tmp_path / "out", "--base", TINY)
    assert result.returncode == 0, result.stderr
    model = gpt2cli.load_model(tmp_path / "out")
    assert model.encoder.encode("The import") == tiny.encoder.encode("The import")
    assert np.abs(model.logits([5, 77]) - tiny.logits([5, 77])).max() > 0.1


def test_a_model_without_vocabulary_says_so(cli, hf, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((hf / name).read_bytes())
    result = cli("convert", tmp_path / "model.safetensors", tmp_path / "out" / "ids")
    assert result.returncode == 0, result.stderr
    assert "takes token ids only; add one with --vocab" in result.stderr
    assert names(tmp_path / "out" / "ids") == [
        *("SHA256SUMS", "checkpoint", "hparams.json"),
        *("model.ckpt.data-00000-of-00001", "model.ckpt.index"),
    ]
    result = cli("convert", tmp_path, tmp_path / "out" / "text", "--vocab", TINY)
    assert result.returncode == 0 and (tmp_path / "out" / "text" / "vocab.bpe").exists()


def rejection(cli, *words):
    result = cli("convert", *words)
    assert result.returncode == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_wrong_paths_are_rejected_without_tensorflow(cli, hf, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gpt2cli.formats.convert", None)  # an import would fail
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "hparams.json").write_text("{}")
    (tmp_path / "file").write_text("")
    assert "nothing at" in rejection(cli, "absent", "out")
    assert "--config: nothing at" in rejection(cli, hf, "out", "--config", "absent.json")
    assert "is a folder" in rejection(cli, hf, "out", "--config", "full")
    assert "--vocab: nothing at" in rejection(cli, hf, "out", "--vocab", "absent")
    assert "is or contains" in rejection(cli, hf, hf, "--overwrite")
    assert "is or contains" in rejection(cli, hf / "model.safetensors", hf, "--overwrite")
    assert "is or contains" in rejection(cli, hf, hf.parent, "--overwrite")
    assert "--overwrite" in rejection(cli, hf, "model")
    assert "is not a model folder" in rejection(cli, hf, "full", "--overwrite")
    assert "it is a file, not a folder" in rejection(cli, hf, "file", "--overwrite")
    (tmp_path / "link").symlink_to("full")
    assert "is not a model folder" in rejection(cli, hf, "link", "--overwrite")


def test_a_model_folder_is_replaced_with_overwrite(cli, hf, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "hparams.json").write_text("{}")
    (tmp_path / "old" / "vocab.txt").write_text("from the old model")
    assert cli("convert", hf, tmp_path / "old", "--overwrite").returncode == 0
    assert "vocab.txt" not in names(tmp_path / "old") and names(tmp_path) == ["old"]
    gpt2cli.load_model(tmp_path / "old")


def test_rejected_models_give_one_line_and_leave_nothing(cli, hf, tmp_path):
    source = tmp_path / "m"
    source.mkdir()
    values = json.loads((hf / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "model_type": "llama"}))
    (source / "model.safetensors").write_bytes((hf / "model.safetensors").read_bytes())
    line = rejection(cli, source, tmp_path / "out")
    assert line.startswith(f'gpt2cli: {source}/config.json: model_type is "llama"')
    assert "--from openai" in rejection(cli, TINY, tmp_path / "out", "--from", "gpt2_ml")
    assert "UER-py" in rejection(cli, hf, tmp_path / "out", "--as_published")
    assert names(tmp_path) == ["m"]


def test_a_path_with_brackets_is_rejected_before_the_work(hf, tmp_path):
    with pytest.raises(UserError, match="TensorFlow cannot read a checkpoint in"):
        convert.run(ConvertOptions(src=str(hf), dst=str(tmp_path / "a[1]")))
    assert names(tmp_path) == []


def test_the_module_does_not_import_tensorflow():
    code = "import sys; from gpt2cli.commands import convert; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
