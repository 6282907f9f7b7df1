"""LoRA adapters: recognized, merged into their base, or rejected by name."""

# ruff: noqa: F401, F811 (fixtures of another test module)

import json

import numpy as np
import pytest
import safetensors.numpy
from test_formats import hf_folder, network, state, weights_of

from gpt2cli.errors import UserError
from gpt2cli.formats.convert import convert, open_source
from gpt2cli.storage import checkpoint

CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "gpt2",
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["c_attn", "c_fc"],
    "bias": "none",
    "modules_to_save": None,
    "megatron_core": "megatron.core",
}
NOISE = np.random.default_rng(3)
PREFIX = "base_model.model.transformer.h"
PAIRS = {
    f"{PREFIX}.0.attn.c_attn.lora_A.weight": NOISE.normal(size=(2, 16)).astype(np.float32),
    f"{PREFIX}.0.attn.c_attn.lora_B.weight": NOISE.normal(size=(48, 2)).astype(np.float32),
    f"{PREFIX}.1.mlp.c_fc.lora_A.default.weight": NOISE.normal(size=(3, 16)).astype(np.float32),
    f"{PREFIX}.1.mlp.c_fc.lora_B.default.weight": NOISE.normal(size=(64, 3)).astype(np.float32),
}


def adapter_folder(folder, arrays=PAIRS, **changes):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    safetensors.numpy.save_file(arrays, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_is_named_as_one(tmp_path):
    folder = adapter_folder(tmp_path / "a")
    for path in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(UserError, match=r"LoRA adapter for gpt2 \(adapter_config.json\)") as e:
            open_source(path)
        assert "--base FOLDER" in str(e.value)


@pytest.mark.parametrize("by_root", [False, True])
def test_an_adapter_is_merged_into_its_base(tmp_path, network, state, by_root):
    folder = adapter_folder(tmp_path / "a", use_rslora=by_root)
    source = open_source(folder, base=hf_folder(tmp_path / "base", state))
    assert any("LoRA adapter for gpt2" in note for note in source.warnings)
    expected = {name: variable.numpy().copy() for name, variable in network.weights.items()}
    for ours, theirs, end, rank in (
        ("model/h0/attn/c_attn/w", "0.attn.c_attn", "", 2),
        ("model/h1/mlp/c_fc/w", "1.mlp.c_fc", ".default", 3),
    ):
        a, b = (PAIRS[f"{PREFIX}.{theirs}.lora_{letter}{end}.weight"] for letter in "AB")
        before = expected[ours].copy()
        expected[ours][0] += (b @ a).T * (6 / (rank**0.5 if by_root else rank))
        assert np.abs(expected[ours] - before).max() > 1
    found = weights_of(source)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)
    convert(source, tmp_path / "merged")
    kept = checkpoint.load(tmp_path / "merged").weights["model/h1/mlp/c_fc/w"]
    np.testing.assert_array_equal(kept, found["model/h1/mlp/c_fc/w"])


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"peft_type": "IA3"}, 'peft_type is "IA3"'),
        ({"use_dora": True}, "use_dora is true"),
        ({"modules_to_save": ["ln_f"]}, "modules_to_save"),
        ({"bias": "all"}, 'bias is "all"'),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"alpha_pattern": {"c_attn": 4}}, "alpha_pattern"),
        ({"a_new_idea": 3}, "a_new_idea"),
        ({"lora_alpha": "6"}, "lora_alpha must be a number"),
        ({"use_rslora": "false"}, "use_rslora true or false"),
    ],
    ids=str,
)
def test_an_adapter_that_is_more_than_two_matrices_is_rejected_by_name(
    tmp_path, state, changes, match
):
    base = hf_folder(tmp_path / "base", state)
    with pytest.raises(UserError, match=match):
        open_source(adapter_folder(tmp_path / "a", **changes), base=base)


@pytest.mark.parametrize(
    "changed, match",
    [
        ({f"{PREFIX}.0.attn.c_attn.lora_B.weight": np.ones((32, 2), np.float32)}, "do not fit"),
        ({f"{PREFIX}.0.attn.c_attn.lora_A.weight": np.ones(16, np.float32)}, "do not fit"),
        (
            {f"{PREFIX}.7.attn.c_attn.lora_A.weight": np.ones((2, 16), np.float32)},
            "has no model/h7",
        ),
        (
            {"base_model.model.lm_head.weight": np.ones((2, 16), np.float32)},
            "it has base_model.*lm_hea",
        ),
    ],
    ids=["shape", "vector", "layer", "other"],
)
def test_an_adapter_of_another_base_is_rejected(tmp_path, state, changed, match):
    base = hf_folder(tmp_path / "base", state)
    with pytest.raises(UserError, match=match):
        open_source(adapter_folder(tmp_path / "a", {**PAIRS, **changed}), base=base)


def test_only_an_adapter_has_a_base(tmp_path, state):
    base = hf_folder(tmp_path / "base", state)
    with pytest.raises(UserError, match="--base is for a LoRA adapter"):
        open_source(base, base=base)
    (base / "adapter_config.json").write_text(json.dumps(CONFIG))
    source = open_source(base)
    assert source.format == "hf" and "the adapter was not applied" in " ".join(source.warnings)
