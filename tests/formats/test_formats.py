"""Models of other programs: read, rejected, written."""

import json
import os
import pickle
import re
import struct
import sys

import numpy as np
import pytest
import safetensors.numpy
from conftest import check_golden, golden_models, golden_vocabulary, lively

from gpt2cli.errors import UserError
from gpt2cli.formats import names
from gpt2cli.formats.convert import _sample_logits, convert, open_source
from gpt2cli.inference.generator import load_model
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.model.weights import weight_shapes
from gpt2cli.storage import checkpoint, folders, reading
from gpt2cli.tensorflow import tf
from gpt2cli.text import encoder
from gpt2cli.text.bpe import CHAR_OF

SIZES = ModelConfig(n_vocab=40, n_ctx=12, n_embd=16, n_head=4, n_layer=2)
HF_CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 40,
    "n_positions": 12,
    "n_ctx": 12,
    "n_embd": 16,
    "n_head": 4,
    "n_layer": 2,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
UER_CONFIG = {
    "emb_size": 16,
    "feedforward_size": 64,
    "hidden_size": 16,
    "hidden_act": "gelu_fast",
    "heads_num": 4,
    "layers_num": 2,
    "max_seq_length": 12,
    "dropout": 0.1,
    "data_processor": "lm",
    "embedding": ["word", "pos"],
    "remove_embedding_layernorm": True,
    "encoder": "transformer",
    "mask": "causal",
    "layernorm_positioning": "pre",
    "target": ["lm"],
    "tie_weights": True,
}


@pytest.fixture(scope="module")
def network():
    return lively(SIZES, seed=11)


@pytest.fixture(scope="module")
def state(network):
    """The weights under Hugging Face's names, written out here without our own maps."""
    arrays = {}
    for name, variable in network.weights.items():
        value = variable.numpy()
        key = re.sub(r"^model/(?:h(\d+)/)?", lambda m: f"h.{m[1]}." if m[1] else "", name)
        key = re.sub(r"/[gw]$", ".weight", key)
        key = re.sub(r"/b$", ".bias", key).replace("/", ".")
        key += ".weight" if key in ("wte", "wpe") else ""
        arrays[f"transformer.{key}"] = value[0] if value.ndim == 3 else value
    return arrays


@pytest.fixture(scope="module")
def uer_state(network):
    """The weights as in UER-py: query, key and value apart, matrices [out, in]."""
    weights = {name.removeprefix("model/"): v.numpy() for name, v in network.weights.items()}
    arrays = {
        "embedding.word.embedding.weight": weights["wte"],
        "embedding.pos.embedding.weight": weights["wpe"],
    }
    for i in range(2):
        ours, theirs = f"h{i}/", f"encoder.transformer.{i}."
        for j in range(3):
            columns = slice(16 * j, 16 * (j + 1))
            linear = f"{theirs}self_attn.linear_layers.{j}"
            arrays[f"{linear}.weight"] = weights[f"{ours}attn/c_attn/w"][0, :, columns].T
            arrays[f"{linear}.bias"] = weights[f"{ours}attn/c_attn/b"][columns]
        for part, name in (
            ("attn/c_proj", "self_attn.final_linear"),
            ("mlp/c_fc", "feed_forward.linear_1"),
            ("mlp/c_proj", "feed_forward.linear_2"),
        ):
            arrays[f"{theirs}{name}.weight"] = weights[f"{ours}{part}/w"][0].T
            arrays[f"{theirs}{name}.bias"] = weights[f"{ours}{part}/b"]
        for j in (1, 2):
            arrays[f"{theirs}layer_norm_{j}.gamma"] = weights[f"{ours}ln_{j}/g"]
            arrays[f"{theirs}layer_norm_{j}.beta"] = weights[f"{ours}ln_{j}/b"]
    arrays["encoder.layer_norm.gamma"] = weights["ln_f/g"]
    arrays["encoder.layer_norm.beta"] = weights["ln_f/b"]
    arrays["target.lm.output_layer.weight"] = weights["wte"]
    return arrays


def hf_folder(folder, arrays, **changes):
    """A Hugging Face folder; a change of None removes the field."""
    folder.mkdir(exist_ok=True)
    values = {k: v for k, v in {**HF_CONFIG, **changes}.items() if v != "gone"}
    (folder / "config.json").write_text(json.dumps(values))
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    safetensors.numpy.save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    return folder


def uer_folder(folder, arrays, **changes):
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**UER_CONFIG, **changes}))
    tensors = {name: torch.tensor(np.ascontiguousarray(a)) for name, a in arrays.items()}
    torch.save(tensors, folder / "model.bin")
    return folder


def weights_of(source):
    shapes = weight_shapes(source.config)
    return {name: source.tensor(name, shape) for name, shape in shapes.items()}


def assert_weights(source, network, tolerance=0.0):
    found = weights_of(source)
    assert found and found.keys() == network.weights.keys()
    for name, variable in network.weights.items():
        assert found[name].dtype == np.float32 and found[name].shape == variable.shape
        np.testing.assert_allclose(found[name], variable.numpy(), atol=tolerance, err_msg=name)


def same_files(one, other):
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
    return all((other / p.name).read_bytes() == p.read_bytes() for p in one.iterdir())


# The original programs' models


@pytest.mark.parametrize("folder", golden_models("gpt2-openai"))
def test_a_transformers_model_converts_to_openais_format_and_back_bit_for_bit(tmp_path, folder):
    hf = folder.parents[1] / "gpt2-hf" / folder.name
    source = open_source(hf)
    assert source.format == "hf"
    convert(source, tmp_path / "ours")
    network = checkpoint.load(tmp_path / "ours")
    check_golden(network, np.load(folder / "expected.npz"))
    openai = open_source(folder)
    assert openai.format == "openai"
    assert_weights(openai, network)

    convert(openai, tmp_path / "hf", to="hf")
    theirs = safetensors.numpy.load_file(hf / "model.safetensors")
    written = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    assert written.keys() == theirs.keys() and len(theirs) > 20
    assert all(np.array_equal(written[key], theirs[key]) for key in theirs)
    said = json.loads((hf / "config.json").read_text())
    ours = json.loads((tmp_path / "hf" / "config.json").read_text())
    without_vocabulary = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert {k: ours[k] for k in ours if k in said and k not in without_vocabulary} == {
        k: said[k] for k in said if k in ours and k not in without_vocabulary
    }
    assert [ours[k] for k in without_vocabulary] == [None] * 3

    convert(open_source(tmp_path / "hf"), tmp_path / "back")
    assert same_files(tmp_path / "ours", tmp_path / "back")


def uer_numbers(network, expected, count=None):
    """For each sequence: its number, logits [T, columns], logits of the next tokens [T-1], loss.

    The loss is the mean over the next tokens, NaN for T = 1.
    """
    count = count or int(expected["n_seq"])
    assert count >= 2
    for i in range(count):
        tokens = expected[f"seq{i}_tokens"]
        nats, _ = network.losses(network.hidden(tokens[None, :-1])[0], tokens[None, 1:])
        logits = network(tokens[None])[0].numpy()
        targets = logits[np.arange(len(tokens) - 1), tokens[1:]]
        yield i, logits[:, expected["cols"]], targets, float(tf.reduce_mean(nats))


@pytest.mark.parametrize("folder", golden_models("uer"))
def test_a_uer_model_gives_the_numbers_of_uer(tmp_path, folder):
    """The subset has no losses, which depend on every id, but the logits they are made of."""
    expected = np.load(folder / "expected.npz")
    vocabulary = golden_vocabulary(folder)
    if (folder / "model.bin").exists():
        pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
        path, config = folder / "model.bin", folder / "config.json"
    else:
        path, config = folder, None
    source = open_source(path, config=config, vocab=vocabulary)
    assert source.format == "uer" and source.special() == ("[CLS]", "[SEP]")
    convert(source, tmp_path / "exact")
    assert (tmp_path / "exact" / "vocab.txt").read_bytes() == vocabulary.read_bytes()
    assert folders.read_config(tmp_path / "exact").ln_epsilon == 1e-12
    network = checkpoint.load(tmp_path / "exact")
    for i, columns, targets, loss in uer_numbers(network, expected):
        np.testing.assert_allclose(columns, expected[f"seq{i}_logits_cols"], atol=1e-3)
        if f"seq{i}_target_logits" in expected:
            np.testing.assert_allclose(targets, expected[f"seq{i}_target_logits"], atol=1e-3)
        else:
            assert loss == pytest.approx(float(expected[f"seq{i}_loss"]), abs=1e-4, nan_ok=True)
    model = load_model(tmp_path / "exact")
    count = int(expected["n_greedy"])
    assert count >= 2
    for j in range(count):
        (sample,) = model.generate(expected[f"greedy{j}_prompt"].tolist(), length=64, temperature=0)
        assert sample.tokens == expected[f"greedy{j}_ids"].tolist()

    plain = open_source(folder, vocab=vocabulary, as_published=True)
    convert(plain, tmp_path / "plain")
    assert "ln_epsilon" not in (tmp_path / "plain" / "hparams.json").read_text()
    network = checkpoint.load(tmp_path / "plain")
    for i, columns, _, loss in uer_numbers(network, expected, count=4):  # only those are stored
        np.testing.assert_allclose(columns, expected[f"seq{i}_hf_plain_logits_cols"], atol=1e-4)
        if f"seq{i}_hf_plain_loss" in expected:
            wanted = float(expected[f"seq{i}_hf_plain_loss"])
            assert loss == pytest.approx(wanted, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("folder", golden_models("gpt2_ml"))
@pytest.mark.parametrize("by_prefix", [False, True], ids=["folder", "prefix"])
def test_gpt2_ml_becomes_a_model_folder(tmp_path, folder, by_prefix):
    vocabulary = golden_vocabulary(folder)
    path = next(folder.glob("*.index")).with_suffix("") if by_prefix else folder
    config = folder / "config.json"
    if by_prefix:  # the released checkpoints come without the json, which is in the repository
        for file in folder.glob("model.ckpt*"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        path = tmp_path / path.name
        with pytest.raises(UserError, match="--config"):
            open_source(path)
    source = open_source(path, config=config if by_prefix else None, vocab=vocabulary)
    assert source.format == "gpt2_ml"
    with pytest.raises(UserError, match="no class for GPT2_ML"):
        convert(source, tmp_path / "hf", to="hf")
    convert(source, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "hparams.json").read_text())["arch"] == "gpt2_ml"
    assert encoder.of_model(tmp_path / "ours").start is None
    network = checkpoint.load(tmp_path / "ours")
    check_golden(network, np.load(folder / "expected.npz"))
    bundle, _ = reading.open_checked(folders.open_model(tmp_path / "ours"))
    assert not any("adafactor" in written for written in bundle.entries)


# Hugging Face's files


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_names_with_and_without_prefix_and_with_buffers_are_read(tmp_path, network, state, prefix):
    arrays = {name.replace("transformer.", prefix, 1): value for name, value in state.items()}
    for layer in range(2):
        arrays[f"{prefix}h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 12, 12), np.uint8))
        arrays[f"{prefix}h.{layer}.attn.masked_bias"] = np.float32(-1e4).reshape(())
    arrays["lm_head.weight"] = state["transformer.wte.weight"]
    assert_weights(open_source(hf_folder(tmp_path / "m", arrays)), network)


def test_the_names_of_the_first_ports_are_read(tmp_path, network, state):
    def old(name):
        name = name.removeprefix("transformer.")
        if name.startswith(("wte", "wpe")):
            return name
        leaf = "g" if "ln_" in name else "w"
        return re.sub("bias$", "b", re.sub("weight$", leaf, name))

    arrays = {old(name): value for name, value in state.items()}
    assert "h.0.ln_1.g" in arrays and "h.1.mlp.c_fc.w" in arrays
    assert_weights(open_source(hf_folder(tmp_path / "m", arrays)), network)


@pytest.mark.parametrize("kind", ["F16", "BF16", "F64"])
def test_other_number_formats_are_widened(tmp_path, network, state, kind):
    import ml_dtypes

    numpy_kind = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}[kind]
    arrays = {name: value.astype(numpy_kind) for name, value in state.items()}
    folder = hf_folder(tmp_path / "m", arrays)
    found = weights_of(open_source(folder))
    assert found and found.keys() == network.weights.keys()
    for name, variable in network.weights.items():
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], variable.numpy().astype(numpy_kind).astype(np.float32))


def split(folder, arrays, name="model.safetensors"):
    """Replace the file of a folder by three and their index."""
    (folder / "model.safetensors").unlink()
    placed = {}
    for i in range(3):
        part = f"model-{i + 1:05}-of-00003.safetensors"
        mine = {key: arrays[key] for key in sorted(arrays)[i::3]}
        safetensors.numpy.save_file(mine, folder / part, {"format": "pt"})
        placed |= dict.fromkeys(mine, part)
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_a_model_in_several_files_is_read(tmp_path, network, state):
    folder = hf_folder(tmp_path / "m", state)
    index = split(folder, state)
    assert_weights(open_source(folder), network)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"lists model-00002-of-00003.safetensors, which is not be"):
        open_source(folder)
    for place in ("../secret.safetensors", 7):
        index["weight_map"]["transformer.wte.weight"] = place
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"secret|weight_map"):
            open_source(folder)


def test_an_index_that_lists_too_much_is_rejected(tmp_path, state):
    folder = hf_folder(tmp_path / "m", state)
    index = split(folder, state)
    index["weight_map"]["transformer.h.9.ln_1.weight"] = "model-00001-of-00003.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"00001.*lacks transformer.h.9.ln_1.weight"):
        open_source(folder)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_a_pytorch_bin_is_read(tmp_path, network, state, kind, old):
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    folder = hf_folder(tmp_path / "m", state)
    (folder / "model.safetensors").unlink()
    tensors = {name: torch.tensor(a).to(getattr(torch, kind)) for name, a in state.items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12, dtype=torch.uint8)
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=not old)
    tolerance = {"float32": 0, "bfloat16": 0.02, "float16": 0.002}[kind]
    assert_weights(open_source(folder), network, tolerance)
    first = dict(list(tensors.items())[:9])
    torch.save(first, folder / "pytorch_model-00001-of-00002.bin")
    rest = {name: t for name, t in tensors.items() if name not in first}
    torch.save(rest, folder / "pytorch_model-00002-of-00002.bin")
    path.unlink()
    placed = {
        name: f"pytorch_model-0000{1 if name in first else 2}-of-00002.bin" for name in tensors
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    assert_weights(open_source(folder), network, tolerance)


class Evil:
    def __reduce__(self):
        return (print, ("a program ran",))


@pytest.mark.parametrize("how", ["pickle", "torch", "cut", "text", "empty", "list"])
def test_a_bin_that_is_not_a_state_dict_is_rejected_and_nothing_in_it_runs(
    tmp_path, state, how, capsys
):
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    path = tmp_path / "pytorch_model.bin"
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    torch.save({name: torch.tensor(array) for name, array in state.items()}, path)
    if how == "torch":
        torch.save({"transformer.wte.weight": Evil()}, path)
    elif how == "list":
        torch.save([1, 2], path)
    else:
        content = {
            "pickle": pickle.dumps({"transformer.wte.weight": Evil()}, protocol=2),
            "cut": path.read_bytes()[:3000],
            "text": b"hello world",
            "empty": b"",
        }[how]
        path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"pytorch_model\.bin (contains more|is damaged|is not a st)"
    ):
        open_source(tmp_path)
    assert "program" not in capsys.readouterr().out


def test_without_pytorch_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="bin/install torch"):
        open_source(tmp_path)


def test_a_folder_with_only_keras_weights_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"no model in .*neither"):
        open_source(tmp_path)
    (tmp_path / "tf_model.h5").write_bytes(b"")
    with pytest.raises(UserError, match=r"only as tf_model.h5.*save_pretrained"):
        open_source(tmp_path)
    (tmp_path / "gpt2-q8.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"cannot read .gguf: get the model as .safetensors"):
        open_source(tmp_path / "gpt2-q8.gguf")


def test_two_formats_or_two_files_in_one_folder_need_a_choice(tmp_path, state, network):
    folder = hf_folder(tmp_path / "m", state)
    checkpoint.save(network, folder)
    with pytest.raises(UserError, match="--from"):
        open_source(folder)
    assert open_source(folder, "hf").format == "hf"
    assert open_source(folder, "openai").format == "openai"
    with pytest.raises(UserError, match="use --from openai, not gpt2_ml"):
        open_source(folder, "gpt2_ml")
    with pytest.raises(UserError, match="use --from hf, not uer"):
        open_source(folder, "uer")
    with pytest.raises(UserError, match="--as_published is for UER-py"):
        open_source(folder, "hf", as_published=True)
    other = tmp_path / "two"
    other.mkdir()
    for name in ("a.bin", "b.bin"):
        (other / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"a.bin, b.bin: name one file"):
        open_source(other)


REJECTED = [
    ("model_type", "gpt_neo"),
    ("activation_function", "gelu_10"),
    ("n_inner", 63),
    ("add_cross_attention", True),
    ("tie_word_embeddings", False),
    ("vocab_size", 41),
    ("n_positions", 11),
    ("n_embd", 32),
    ("n_layer", 3),
    ("n_head", 3),
    ("n_head", "4"),
    ("layer_norm_epsilon", "small"),
    ("layer_norm_epsilon", 10**400),
]


@pytest.mark.parametrize("name, value", REJECTED)
def test_a_config_that_fits_neither_our_network_nor_the_weights_names_the_field(
    tmp_path, state, name, value
):
    folder = hf_folder(tmp_path / "m", state, **{name: value})
    with pytest.raises(UserError, match=rf"config.json: .*{name}"):
        open_source(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_inner": 64},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "gelu_fast"},
        {"reorder_and_upcast_attn": True},
        {"model_type": "gone"},
        {"n_ctx": "gone"},
        {"layer_norm_epsilon": "gone"},
    ],
    ids=str,
)
def test_an_equivalent_config_is_read(tmp_path, network, state, changes):
    assert_weights(open_source(hf_folder(tmp_path / "m", state, **changes)), network)


def test_the_epsilon_is_kept(tmp_path, state):
    source = open_source(hf_folder(tmp_path / "m", state, layer_norm_epsilon=1e-6))
    convert(source, tmp_path / "ours")
    assert folders.read_config(tmp_path / "ours").ln_epsilon == 1e-6
    convert(open_source(tmp_path / "ours"), tmp_path / "hf", to="hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["layer_norm_epsilon"] == 1e-6


def test_the_number_of_heads_comes_from_the_json_or_the_flag(tmp_path, network, state):
    folder = hf_folder(tmp_path / "m", state, n_head="gone")
    with pytest.raises(UserError, match="no n_head: give --config FILE or --n_head"):
        open_source(folder)
    assert_weights(open_source(folder, n_head=4), network)
    (folder / "config.json").unlink()
    assert open_source(folder / "model.safetensors", n_head=4).config == SIZES
    (tmp_path / "other.json").write_text(json.dumps(HF_CONFIG))
    assert open_source(folder, config=tmp_path / "other.json").config == SIZES
    with pytest.raises(UserError, match="--n_head 2 contradicts n_head 4"):
        open_source(folder, config=tmp_path / "other.json", n_head=2)
    with pytest.raises(UserError, match="--n_head: n_embd 16 is not a multiple of n_head 5"):
        open_source(folder, n_head=5)


def test_missing_extra_and_misshapen_weights_are_named(tmp_path, state):
    def rejected(arrays, match, **changes):
        with pytest.raises(UserError, match=match):
            open_source(hf_folder(tmp_path / "m", arrays, **changes))

    name = "transformer.h.1.attn.c_attn.bias"
    without = {key: value for key, value in state.items() if key != name}
    rejected(without, r"lacks h\.1\.attn\.c_attn\.bias")
    rejected({**state, "other.weight": state[name]}, r"has other\.weight, unlike GPT-2")
    rejected({**state, name: state[name][:-1]}, r"c_attn\.bias is \[47\].* require \[48\]")
    wrong = {**state, "transformer.h.0.mlp.c_fc.weight": np.zeros((64, 16), np.float32)}
    rejected(wrong, r"h\.0\.mlp\.c_fc\.weight is \[64, 16\].*\[16, 64\]")
    rejected({"a": state[name]}, r"lack wpe\.weight, wte\.weight")
    first = {key: value for key, value in state.items() if ".h.1." not in key}
    rejected(first, "n_layer is 2, but the weights have 1")


def test_integer_and_non_finite_weights_are_rejected_when_read(tmp_path, state):
    table = "transformer.wte.weight"
    whole = {**state, table: state[table].astype(np.int32)}
    source = open_source(hf_folder(tmp_path / "m", whole))
    with pytest.raises(UserError, match=r"transformer\.wte\.weight is I32"):
        convert(source, tmp_path / "out")
    broken = {**state, table: np.full_like(state[table], np.nan)}
    source = open_source(hf_folder(tmp_path / "m", broken))
    with pytest.raises(UserError, match=r"wte\.weight has values that are not finite"):
        convert(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_separate_output_matrix_is_rejected(tmp_path, state):
    head = state["transformer.wte.weight"].copy()
    head[3, 5] += 1e-3
    folder = hf_folder(tmp_path / "m", {**state, "lm_head.weight": head})
    with pytest.raises(UserError, match="lm_head"):
        open_source(folder)


def safetensors_file(header, data=b"\0" * 64):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [4, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        struct.pack("<Q", 1 << 60) + b"{}",
        safetensors_file(b'{"a": '),
        safetensors_file({"a": {**F32, "data_offsets": [0, 6400]}}),
        safetensors_file({"a": {**F32, "data_offsets": [0, 60]}}),
        safetensors_file({"a": {**F32, "data_offsets": [64, 0]}}),
        safetensors_file({"a": {**F32, "shape": [1 << 40, 1 << 40], "data_offsets": [0, 64]}}),
        safetensors_file({"a": {**F32, "dtype": "F33", "data_offsets": [0, 64]}}),
    ],
)
def test_a_wrong_header_gives_a_one_line_error(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors is damaged") as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


# UER-py's files


def test_a_uer_state_dict_is_converted(tmp_path, network, uer_state):
    folder = uer_folder(tmp_path / "m", uer_state)
    plain = open_source(folder, as_published=True)
    assert plain.config == SIZES
    assert_weights(plain, network)
    (folder / "model.bin").rename(folder / "model.bin-250000")
    exact, weights = open_source(folder), network.weights
    assert exact.config.ln_epsilon == 1e-12
    gain = exact.tensor("model/h1/ln_2/g", (16,))
    np.testing.assert_allclose(gain, weights["model/h1/ln_2/g"] * (15 / 16) ** 0.5, rtol=1e-6)
    bias = exact.tensor("model/h1/ln_2/b", (16,))
    np.testing.assert_array_equal(bias, weights["model/h1/ln_2/b"])


def test_the_names_before_2022_are_read(tmp_path, network, uer_state):
    older = {new: old for old, new in names.UER_OLD.items()}
    arrays = {older.get(name, name): value for name, value in uer_state.items()}
    assert "embedding.word_embedding.weight" in arrays and "target.output_layer.weight" in arrays
    folder = uer_folder(tmp_path / "m", arrays, embedding="word_pos", target="lm")
    assert_weights(open_source(folder, as_published=True), network)


@pytest.mark.parametrize(
    "name, value",
    [
        ("embedding", ["word", "pos", "seg"]),
        ("remove_embedding_layernorm", False),
        ("encoder", "lstm"),
        ("mask", "fully_visible"),
        ("layernorm_positioning", "post"),
        ("layernorm", "t5"),
        ("feed_forward", "gated"),
        ("feedforward_size", 48),
        ("hidden_act", "linear"),
        ("target", ["mlm"]),
        ("tie_weights", False),
        ("remove_transformer_bias", True),
        ("layers_num", 3),
        ("hidden_size", 24),
        ("max_seq_length", 13),
    ],
)
def test_an_unsupported_uer_config_names_the_field(tmp_path, uer_state, name, value):
    folder = uer_folder(tmp_path / "m", uer_state, **{name: value})
    with pytest.raises(UserError, match=rf"config.json: {name} is"):
        open_source(folder)


def test_unsupported_uer_weights_are_named(tmp_path, uer_state):
    norm = {f"embedding.layer_norm.{leaf}": np.ones(16, np.float32) for leaf in ("gamma", "beta")}
    folder = uer_folder(tmp_path / "m", {**uer_state, **norm})
    with pytest.raises(UserError, match=r"has embedding\.layer_norm\.beta"):
        open_source(folder)
    untied = {**uer_state, "target.lm.output_layer.weight": np.ones((40, 16), np.float32)}
    with pytest.raises(UserError, match="output_layer"):
        open_source(uer_folder(tmp_path / "m", untied))


def test_a_uer_bin_alone_needs_the_number_of_heads(tmp_path, uer_state):
    folder = uer_folder(tmp_path / "m", uer_state)
    (folder / "config.json").rename(tmp_path / "base.json")
    with pytest.raises(UserError, match="give --config FILE or --n_head"):
        open_source(folder / "model.bin")
    assert open_source(folder / "model.bin", n_head=4).config.n_head == 4
    named = open_source(folder / "model.bin", config=tmp_path / "base.json")
    assert named.config.n_head == 4
    assert named.warnings and "--vocab" in named.warnings[-1]


# Vocabularies

WORDPIECE = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "天", "气", "##s", "day", "Day"]


def byte_vocabulary(*more):
    tokens = [*CHAR_OF.values(), "Ġt", "Ġth", *more]
    return {token: index for index, token in enumerate(tokens)}, ["Ġ t", "Ġt h"]


@pytest.fixture
def wide(state):
    """The weights with room for a vocabulary of bytes."""
    table = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    return {**state, "transformer.wte.weight": table}


def test_bpe_files_keep_their_bytes_and_special_tokens(tmp_path, wide):
    vocab, merges = byte_vocabulary("<s>", "</s>")
    folder = hf_folder(tmp_path / "m", wide, vocab_size=300, eos_token_id=259)
    (folder / "vocab.json").write_text(json.dumps(vocab, indent=1))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    convert(open_source(folder), tmp_path / "ours")
    hparams = json.loads((tmp_path / "ours" / "hparams.json").read_text())
    assert (hparams["start_token"], hparams["end_token"]) == ("<s>", "</s>")
    for ours, theirs in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        assert (tmp_path / "ours" / ours).read_bytes() == (folder / theirs).read_bytes()
    encoded = encoder.of_model(tmp_path / "ours")
    assert (encoded.start, encoded.end, encoded.encode(" th")) == (258, 259, [257])

    convert(open_source(tmp_path / "ours"), tmp_path / "hf", to="hf")
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"], said["pad_token_id"]) == (258, 259, None)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (folder / name).read_bytes()
    convert(open_source(tmp_path / "hf"), tmp_path / "back")
    assert same_files(tmp_path / "ours", tmp_path / "back")


def test_added_tokens_are_kept_if_the_model_has_room(tmp_path, wide):
    vocab, merges = byte_vocabulary()
    folder = hf_folder(tmp_path / "m", wide, vocab_size=300, eos_token_id=258)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(merges))
    (folder / "added_tokens.json").write_text(json.dumps({"<end>": 258, "<pad>": 300}))
    source = open_source(folder)
    assert source.special() == (None, "<end>") and "<pad>" not in source.tokens()


@pytest.mark.parametrize("pairs", [False, True], ids=["text", "pairs"])
def test_a_byte_level_tokenizer_json_gives_both_files(tmp_path, wide, pairs):
    vocab, merges = byte_vocabulary()
    folder = hf_folder(tmp_path / "m", wide, vocab_size=300)
    values = {
        "added_tokens": [{"id": 258, "content": "<|endoftext|>", "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    if pairs:
        values["model"]["merges"] = [merge.split(" ") for merge in merges]
        values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [values["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    convert(open_source(folder), tmp_path / "ours")
    encoded = encoder.of_model(tmp_path / "ours")
    assert (encoded.end, encoded.encode(" th")) == (258, [257])


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json", "google_zh_vocab.txt"])
def test_a_wordpiece_vocabulary_is_found(tmp_path, state, file, lower):
    folder = hf_folder(tmp_path / "m", state)
    named = None
    if file == "tokenizer.json":
        vocab = {token: index for index, token in enumerate(WORDPIECE)}
        values = {
            "normalizer": {
                "type": "BertNormalizer",
                "clean_text": True,
                "handle_chinese_chars": True,
                "strip_accents": None,
                "lowercase": lower,
            },
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "model": {
                "type": "WordPiece",
                "vocab": vocab,
                "unk_token": "[UNK]",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
            },
        }
        (folder / file).write_text(json.dumps(values))
    else:
        place = folder if file == "vocab.txt" else tmp_path
        (place / file).write_text("\n".join(WORDPIECE) + "\n")
        named = None if file == "vocab.txt" else place / file
    if file == "vocab.txt":
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    source = open_source(folder, vocab=named)
    convert(source, tmp_path / "ours")
    encoded = encoder.of_model(tmp_path / "ours")
    lower = lower or file == "google_zh_vocab.txt"
    assert encoded.lower_case is lower and encoded.n_vocab == 10
    assert encoded.encode("Day 天气") == [8 if lower else 9, 5, 6]
    expected = {"tokenizer": "wordpiece"} if file == "tokenizer.json" else {"lower_case": False}
    expected = {} if lower and file != "tokenizer.json" else expected
    extra = folders.read_config(tmp_path / "ours").extra
    assert extra.pop("tokenizer_crc32", "").isalnum() is ("tokenizer" in expected)
    assert extra == expected
    convert(open_source(tmp_path / "ours"), tmp_path / "hf", to="hf")
    if file == "tokenizer.json":
        assert (tmp_path / "hf" / file).read_bytes() == (folder / file).read_bytes()
        assert not (tmp_path / "hf" / "tokenizer_config.json").exists()
    else:
        tokenizer = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
        assert tokenizer["do_lower_case"] is lower
        back = open_source(tmp_path / "hf").vocabulary.described
        assert back.around() == ([2], []) and back.values["normalizer"]["lowercase"] is lower
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"], said["pad_token_id"]) == (2, 3, 0)


def test_a_sentencepiece_model_is_rejected_before_any_weight_is_read(tmp_path, state):
    folder = hf_folder(tmp_path / "m", state)
    (folder / "spiece.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(UserError, match=r"spiece.model is damaged or not a SentencePiece model"):
        open_source(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "AlbertTokenizer"}')
    with pytest.raises(UserError, match=r"made for 'AlbertTokenizer'.*save_pretrained"):
        open_source(folder)


@pytest.mark.parametrize(
    "values",
    [
        {
            "model": {"type": "BPE", "vocab": {}, "merges": 7},
            "pre_tokenizer": {"type": "ByteLevel"},
        },
        {"model": {"type": "BPE", "vocab": {}}, "pre_tokenizer": "ByteLevel"},
        {"model": {"type": "WordPiece", "vocab": {"a": "b", "c": 1}}},
        {"model": {"type": "Unigram", "vocab": [["a", -1.0], 7]}},
        {"model": {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 9}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}}, "added_tokens": [{"content": 3}]},
        {"model": {"type": "Neural", "vocab": {"a": 0}}},
        {"model": {"type": "BPE"}},
        {"model": [1]},
        {
            "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [],
                "pair": [],
                "special_tokens": {},
            },
        },
    ],
    ids=[
        *("merges", "pre_tokenizer", "ids", "pairs", "unk_id", "merge", "added", "type", "vocab"),
        *("model", "template"),
    ],
)
def test_a_damaged_tokenizer_gives_a_one_line_error(tmp_path, state, values):
    folder = hf_folder(tmp_path / "m", state)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"tokenizer.json(:| is not a valid tokenizer.json)"):
        open_source(folder)


def test_a_tokenizer_class_that_the_files_do_not_describe_is_rejected(tmp_path, state):
    folder = hf_folder(tmp_path / "m", state)
    (folder / "vocab.txt").write_text("\n".join(WORDPIECE))
    values = {"tokenizer_class": "BertJapaneseTokenizer", "eos_token": ["odd"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"tokenizer_class is 'BertJapaneseTokenizer'.*--vocab"):
        open_source(folder)


def test_the_vocabulary_of_another_model_is_rejected(tmp_path, state):
    folder = hf_folder(tmp_path / "m", state)
    (tmp_path / "v.txt").write_text("\n".join([*WORDPIECE, *map(str, range(31))]) + "\n")
    with pytest.raises(UserError, match="41 tokens, but the model only 40"):
        open_source(folder, vocab=tmp_path / "v.txt")
    (tmp_path / "v.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"v.txt lacks \[UNK\]"):
        convert(open_source(folder, vocab=tmp_path / "v.txt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"has only vocab.json"):
        open_source(folder)


# Writing


def test_a_crash_at_any_time_leaves_nothing(tmp_path, state, monkeypatch):
    source = open_source(hf_folder(tmp_path / "m", state))
    for name in ("_sample_logits", "checkpoint.save", "_write_openai_description"):
        for error in (KeyboardInterrupt, OSError(28, "No space left on device")):

            def crash(*_, error=error):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(f"gpt2cli.formats.convert.{name}", crash)
                with pytest.raises((KeyboardInterrupt, UserError)):
                    convert(source, tmp_path / "new" / "deep" / "out")
            assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_folder_is_replaced_only_when_the_new_one_is_complete(tmp_path, state, monkeypatch):
    source, dst = open_source(hf_folder(tmp_path / "m", state)), tmp_path / "out"
    dst.mkdir()
    (dst / "hparams.json").write_text("the old one")
    with pytest.raises(UserError, match="--overwrite"):
        convert(source, dst)
    rename = os.rename

    def fail(old, new):
        if ".part" in str(old):
            raise OSError(5, "Input/output error")
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(UserError, match="Input/output error"):
            convert(source, dst, overwrite=True)
    assert (dst / "hparams.json").read_text() == "the old one"
    convert(source, dst, overwrite=True)
    assert folders.read_config(dst) == SIZES
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


def test_a_result_with_other_logits_is_discarded(tmp_path, state, monkeypatch):
    source = open_source(hf_folder(tmp_path / "m", state))
    calls = []

    def drifting(network):
        calls.append(network)
        return _sample_logits(network) + 2e-4 * len(calls)

    monkeypatch.setattr("gpt2cli.formats.convert._sample_logits", drifting)
    with pytest.raises(UserError, match=r"logits by 0.0002"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
