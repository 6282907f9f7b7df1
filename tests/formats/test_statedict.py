"""State dicts as strangers save them: wrapped, with other heads, other settings, other layouts."""

# ruff: noqa: F401, F811 (fixtures of another test module)

import json
import re

import numpy as np
import oracle
import pytest
from conftest import lively
from safetensors.numpy import save_file
from test_formats import SIZES, assert_weights, hf_folder, network, state, weights_of

from gpt2cli.errors import UserError
from gpt2cli.formats import tensors
from gpt2cli.formats.convert import convert, open_source
from gpt2cli.formats.statedict import open_weights
from gpt2cli.model.network import GPT2
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.storage import checkpoint, folders

IDS = np.array([5, 30, 5, 17, 2, 2, 39, 0, 11], np.int32)
HEAD = "transformer.wte.weight"


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")


def renamed(state, rename):
    return {rename(name): value for name, value in state.items()}


WRAPPED = {
    "bare": lambda n: n.removeprefix("transformer."),
    "DataParallel": lambda n: f"module.{n}",
    "compile": lambda n: f"_orig_mod.{n}",
    "both": lambda n: f"_orig_mod.module.{n}",
    "bare and both": lambda n: "module._orig_mod." + n.removeprefix("transformer."),
    "Lightning": lambda n: f"model.{n}",
    "layers compiled": lambda n: re.sub(r"(h\.\d\.)", r"\1_orig_mod.", n),
    "FSDP": lambda n: "_fsdp_wrapped_module." + re.sub(r"(h\.\d)", r"\1._fsdp_wrapped_module", n),
    "trl": lambda n: f"pretrained_model.{n}",
}


@pytest.mark.parametrize("how", WRAPPED)
def test_prefixes_that_programs_put_before_names_are_ignored(tmp_path, network, state, how):
    rename = WRAPPED[how]
    masks = {f"transformer.h.{i}.attn.bias": np.ones((1, 1, 12, 12), np.float32) for i in range(2)}
    plain = {**state, "lm_head.weight": state[HEAD], **masks}
    source = open_source(hf_folder(tmp_path / "m", renamed(plain, rename)))
    assert_weights(source, network)
    assert not [note for note in source.warnings if "vocabulary" not in note]


def test_two_models_in_one_file_are_not_mixed(tmp_path, state):
    both = {**state, **renamed(state, lambda n: f"module.{n}")}
    with pytest.raises(UserError, match="has both .*, so it contains two models"):
        open_source(hf_folder(tmp_path / "m", both))
    both = {**renamed(state, lambda n: f"encoder.{n}"), **renamed(state, lambda n: f"decoder.{n}")}
    with pytest.raises(UserError, match="unlike GPT-2"):
        open_source(hf_folder(tmp_path / "m", both))


@pytest.mark.parametrize("head", ["lm_head.weight", "lm_head.decoder.weight"])
def test_a_separate_output_matrix_may_be_the_token_table(tmp_path, network, state, head):
    folder = hf_folder(tmp_path / "m", {**state, head: state[HEAD]}, tie_word_embeddings=False)
    assert_weights(open_source(folder), network)
    untied = {**state, head: state[HEAD] + np.float32(1e-3)}
    with pytest.raises(UserError, match="differs from the token embedding"):
        open_source(hf_folder(tmp_path / "other", untied))


def test_the_token_table_may_be_stored_only_as_the_output_matrix(tmp_path, network, state):
    for number, wrap in enumerate(("", "module.")):
        once = {f"{wrap}{name}": value for name, value in state.items() if name != HEAD}
        folder = hf_folder(tmp_path / str(number), {**once, f"{wrap}lm_head.weight": state[HEAD]})
        assert_weights(open_source(folder), network)
    untied = {**once, "module.lm_head.weight": state[HEAD]}
    with pytest.raises(UserError, match="tie_word_embeddings is false"):
        open_source(hf_folder(tmp_path / "untied", untied, tie_word_embeddings=False))


def test_heads_that_score_texts_are_skipped_and_named(tmp_path, network, state):
    value = {
        "v_head.summary.weight": np.ones((1, 16), np.float32),
        "v_head.summary.bias": np.ones(1, np.float32),
    }
    source = open_source(hf_folder(tmp_path / "m", {**state, **value}))
    assert_weights(source, network)
    assert any("ignored v_head.summary.bias, v_head.summary.weight" in n for n in source.warnings)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("score.weight", "it is a classifier"),
        ("transformer.h.0.attn.c_attn.lora_A.weight", r"LoRA adapter.*merge_and_unload"),
        ("transformer.h.0.attn.c_attn.weight.absmax", r"quantized model.*dequantize"),
        ("transformer.h.0.mlp.c_fc.qweight", "quantized model"),
        ("transformer.h.0.attn.rotary_emb.inv_freq", "another kind of model"),
        ("transformer.h.0.crossattention.c_attn.weight", "another kind of model"),
    ],
)
def test_tensors_of_another_kind_of_model_name_it(tmp_path, state, name, kind):
    folder = hf_folder(tmp_path / "m", {**state, name: np.ones((2, 16), np.float32)})
    with pytest.raises(UserError, match=kind) as caught:
        open_source(folder)
    assert name.removeprefix("transformer.") in str(caught.value)


# Settings


def test_a_left_over_n_ctx_is_ignored_and_named(tmp_path, network, state):
    source = open_source(hf_folder(tmp_path / "m", state, n_ctx=1024))
    assert_weights(source, network)
    assert source.config.n_ctx == 12
    assert any("n_ctx 1024 is ignored" in note for note in source.warnings)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"position_embedding_type": "rotary"}, "position_embedding_type"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"scale_attn_weights": "no"}, "scale_attn_weights"),
        ({"activation_function": "mish"}, "activation_function"),
        ({"activation_function": ["gelu"]}, "activation_function"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\)"),
    ],
    ids=str,
)
def test_a_setting_that_changes_the_network_is_rejected_by_name(tmp_path, state, changes, match):
    with pytest.raises(UserError, match=match):
        open_source(hf_folder(tmp_path / "m", state, **changes))


def test_a_setting_that_no_gpt_2_has_is_named(tmp_path, network, state):
    more = {"alibi": True, "auto_map": {"AutoModel": "my.Model"}, "task_specific_params": {}}
    source = open_source(hf_folder(tmp_path / "m", state, **more))
    assert_weights(source, network)
    said = " ".join(source.warnings)
    assert "ignored alibi, which" in said and "(auto_map). It is not run" in said
    assert "task_specific" not in said


@pytest.mark.parametrize("theirs, ours", [("gelu", "gelu"), ("swish", "silu"), ("relu", "relu")])
def test_activation_and_inner_width_go_there_and_back(tmp_path, theirs, ours):
    odd = lively(ModelConfig(40, 12, 16, 4, 2, activation=ours, n_inner=24), seed=5)
    checkpoint.save(odd, tmp_path / "ours")
    convert(open_source(tmp_path / "ours"), tmp_path / "hf", to="hf")
    path = tmp_path / "hf" / "config.json"
    said = json.loads(path.read_text())
    assert (said["activation_function"], said["n_inner"]) == (ours, 24)
    path.write_text(json.dumps({**said, "activation_function": theirs}))
    source = open_source(tmp_path / "hf")
    assert f"activation {ours}" in source.describe() and "24 wide inside" in source.describe()
    convert(source, tmp_path / "again")
    assert folders.read_config(tmp_path / "again") == odd.config
    weights = {name: variable.numpy() for name, variable in odd.weights.items()}
    found = checkpoint.load(tmp_path / "again")(IDS[None])[0]
    expected = oracle.logits(weights, 4, IDS, activation=ours)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    path.write_text(json.dumps({**said, "n_inner": 25}))
    with pytest.raises(UserError, match="n_inner is 25, but the weights have 24"):
        open_source(tmp_path / "hf")


@pytest.mark.parametrize(
    "changes, scales",
    [
        ({"scale_attn_weights": False}, [1, 1]),
        ({"scale_attn_by_inverse_layer_idx": True}, [1 / 2, 1 / 4]),
        ({"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}, [1, 1 / 2]),
    ],
    ids=str,
)
def test_another_scale_of_attention_is_moved_into_the_queries(tmp_path, state, changes, scales):
    source = open_source(hf_folder(tmp_path / "m", state, **changes))
    found = GPT2(source.config, source.tensor)(IDS[None])[0]
    plain = open_source(hf_folder(tmp_path / "plain", state))
    expected = oracle.logits(weights_of(plain), 4, IDS, scales=scales)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(oracle.logits(weights_of(plain), 4, IDS) - expected).max() > 1e-3
    assert any("scaled instead" in note for note in source.warnings)


def test_hparams_json_rejects_the_names_of_config_json():
    sizes = {"n_vocab": 4, "n_ctx": 4, "n_embd": 4, "n_head": 1, "n_layer": 1}
    with pytest.raises(UserError, match="activation_function is transformers' name; write activat"):
        ModelConfig.from_json(json.dumps({**sizes, "activation_function": "gelu"}))
    for wrong in ({"activation": "mish"}, {"n_inner": 0}, {"n_inner": "8"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            ModelConfig.from_json(json.dumps({**sizes, **wrong}))
    with pytest.raises(UserError, match="leave out activation"):
        ModelConfig.from_json(json.dumps({**sizes, "arch": "gpt2_ml", "activation": "relu"}))


# nanoGPT and other training checkpoints


def linear(state, prefix="_orig_mod."):
    """The weights as nanoGPT saves them: matrices [out, in], the table twice, a mask."""
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    arrays = {n: v.T if n.endswith(matrices) else v for n, v in state.items()}
    arrays["transformer.h.0.attn.bias"] = np.ones((1, 1, 12, 12), np.float32)
    return {prefix + n: v for n, v in {**arrays, "lm_head.weight": state[HEAD]}.items()}


def saved(torch, path, arrays, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {n: torch.tensor(np.ascontiguousarray(a)) for n, a in arrays.items()}
    arguments = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 12, "vocab_size": 40}
    content = {
        "model": state,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
        "model_args": {**arguments, "bias": True, "dropout": 0.0},
        "iter_num": 5,
        "best_val_loss": torch.tensor(2.0),
        "config": {"out_dir": "out", "compile": True},
    }
    torch.save({**content, **more}, path)
    return path


def test_a_checkpoint_of_nanogpt_is_read(torch, tmp_path, network, state):
    path = saved(torch, tmp_path / "out" / "ckpt.pt", linear(state))
    source = open_source(path.parent)
    assert source.format == "nanogpt" and source.config.activation == "gelu"
    assert_weights(source, network)
    said = " ".join(source.warnings)
    assert (
        "only model of the training checkpoint is read; ignored best_val_loss, config, iter_num "
        "and 1 more" in said
    )
    assert "assuming gelu" in said and "--activation gelu_new" in said
    older = open_source(path, activation="gelu_new")
    assert older.config == SIZES and "assuming" not in " ".join(older.warnings)
    convert(source, tmp_path / "ours")
    weights = {name: variable.numpy() for name, variable in network.weights.items()}
    found = checkpoint.load(tmp_path / "ours")(IDS[None])[0]
    expected = oracle.logits(weights, 4, IDS, activation="gelu")
    np.testing.assert_allclose(found, expected, atol=2e-5)
    other = np.abs(found - oracle.logits(weights, 4, IDS)).max()
    assert other > 5e-5  # so the other GELU would have shown


def test_a_nanogpt_without_biases_has_zeros(torch, tmp_path, network, state):
    arrays = {
        n: v for n, v in linear(state, "").items() if not re.search(r"(_|\d\.|ln_f\.).*bias", n)
    }
    assert not any(name.endswith("ln_1.bias") for name in arrays)
    source = open_source(saved(torch, tmp_path / "ckpt.pt", arrays))
    for name, value in weights_of(source).items():
        expected = network.weights[name].numpy()
        np.testing.assert_array_equal(value, 0 * expected if name.endswith("/b") else expected)
    some = {**arrays, "transformer.ln_f.bias": state["transformer.ln_f.bias"]}
    with pytest.raises(UserError, match="lacks"):
        open_source(saved(torch, tmp_path / "some.pt", some))


def test_sizes_of_a_nanogpt_must_fit_its_weights(torch, tmp_path, state):
    arguments = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 13, "vocab_size": 40}
    path = saved(torch, tmp_path / "ckpt.pt", linear(state), model_args=arguments)
    with pytest.raises(UserError, match=r"ckpt.pt: n_positions is 13, but the weights have 12"):
        open_source(path)
    arguments = {**arguments, "block_size": 12, "rope": True}
    path = saved(torch, tmp_path / "ckpt.pt", linear(state), model_args=arguments)
    assert any("ignored rope of model_args" in note for note in open_source(path).warnings)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "module", "model"])
def test_a_state_dict_inside_a_training_checkpoint_is_read(torch, tmp_path, network, state, key):
    tensors = {f"model.{n}": torch.tensor(a) for n, a in state.items()}
    torch.save({key: tensors, "epoch": 3, "loss": 1.5}, tmp_path / "last.ckpt")
    source = open_source(tmp_path / "last.ckpt", n_head=4)
    assert source.format == "hf"
    assert any("assuming gelu_new" in note for note in source.warnings)
    assert_weights(source, network)
    assert any(
        f"only {key} of the training checkpoint is read; ignored epoch, loss" in note
        for note in source.warnings
    )
    torch.save({"net": tensors}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="is not a state dict"):
        open_source(tmp_path / "odd.pt", n_head=4)


def test_a_program_inside_a_training_checkpoint_is_never_run(torch, tmp_path, state, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("program",)

    path = saved(torch, tmp_path / "ckpt.pt", linear(state), config=Evil())
    capsys.readouterr()
    with pytest.raises(UserError, match="contains more than tensors"):
        open_source(path)
    assert "program" not in capsys.readouterr().out


def test_a_flag_must_not_contradict_the_files(tmp_path, network, state):
    checkpoint.save(network, tmp_path / "openai")
    for folder in (hf_folder(tmp_path / "m", state), tmp_path / "openai"):
        with pytest.raises(UserError, match="--activation gelu contradicts gelu_new of"):
            open_source(folder, activation="gelu")


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 20, "99999", "\u0663"])
def test_an_impossible_layer_number_is_reported_in_one_line(tmp_path, number):
    table = np.ones((2, 2), np.float32)
    names = ("wte.weight", "wpe.weight", "h.0.ln_1.weight", f"h.{number}.ln_1.weight")
    save_file(dict.fromkeys(names, table), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks h\.0\.|unlike GPT-2") as caught:
        open_weights(tensors.read(tmp_path / "model.safetensors"), n_head=1)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_names_of_tensors_are_printed_with_their_escapes():
    assert tensors.few(["\x1b[2Ja\n\u202eb"]) == "\\x1b[2Ja\\n\\u202eb"
    assert len(tensors.few(["x" * 10**6])) == 80


@pytest.mark.parametrize("kind", ["expanded", "sparse", "meta"])
def test_a_tensor_that_is_larger_than_its_file_is_rejected(tmp_path, kind):
    torch = pytest.importorskip("torch")
    made = {
        "expanded": torch.zeros(1).expand(10**9, 1000),
        "sparse": torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), (10**9, 1000)),
        "meta": torch.zeros(10**9, 1000, device="meta"),
    }[kind]
    torch.save({"wte.weight": made, "wpe.weight": torch.zeros(2, 2)}, tmp_path / "model.bin")
    with pytest.raises(UserError, match=r"wte.weight is a view, sparse or without values"):
        tensors.read(tmp_path / "model.bin")
