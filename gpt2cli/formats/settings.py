"""The config.json of other programs: which fields change the network, and to what.

Every field is obeyed, rejected by name, or known to change nothing; any other is reported.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpt2cli import files
from gpt2cli.errors import UserError
from gpt2cli.formats.tensors import few

# Our name of each size -> its names in a config.json; the first is the one we write.
SIZE_FIELDS = {
    "hf": {
        "n_vocab": ("vocab_size",),
        "n_ctx": ("n_positions", "max_position_embeddings"),
        "n_embd": ("n_embd", "hidden_size"),
        "n_head": ("n_head", "num_attention_heads"),
        "n_layer": ("n_layer", "num_hidden_layers"),
        "n_inner": ("n_inner",),
    },
    "uer": {
        "n_vocab": ("vocab_size",),
        "n_ctx": ("max_seq_length",),
        "n_embd": ("hidden_size", "emb_size"),
        "n_head": ("heads_num",),
        "n_layer": ("layers_num",),
        "n_inner": ("feedforward_size",),
    },
}
LEFT_OVER = "n_ctx"  # transformers has read only n_positions since 2020; many files keep both
# The field that names the activation function, and our name of each of its values. Several names
# stand for one function: transformers/activations.py, UER-py uer/utils/act_fun.py.
ACTIVATION_FIELDS = {"hf": "activation_function", "uer": "hidden_act"}
ACTIVATIONS = {
    "hf": {
        **dict.fromkeys(
            ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate"),
            "gelu_new",
        ),
        **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
        **dict.fromkeys(("silu", "swish"), "silu"),
        "relu": "relu",
        "tanh": "tanh",
    },
    "uer": {"gelu_fast": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"},
}
# Fields that change the network in a way that we do not have -> the values that are right. A
# missing field is taken to be right; most would show in the weights.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "hf": {
        "model_type": ("gpt2",),
        "add_cross_attention": (False,),
        "is_encoder_decoder": (False,),
        "position_embedding_type": ("absolute",),
        "pruned_heads": ({}, None),
        "scale_attn_weights": (True, False),
        "scale_attn_by_inverse_layer_idx": (True, False),
    },
    "uer": {  # UER-py opts.py and models/gpt2/*.json, the older files included
        "embedding": (["word", "pos"], "word_pos"),
        "remove_embedding_layernorm": (True,),
        "encoder": ("transformer",),
        "mask": ("causal",),
        "layernorm_positioning": ("pre",),
        "layernorm": ("normal",),
        "layernorm_eps": (1e-6,),
        "feed_forward": ("dense",),
        "target": (["lm"], "lm"),
        "tie_weights": (True,),
        "factorized_embedding_parameterization": (False,),
        "parameter_sharing": (False,),
        "has_residual_attention": (False,),
        "remove_attention_scale": (False,),
        "remove_transformer_bias": (False,),
        "relative_position_embedding": (False,),
        "rotary_position_embedding": (False,),
    },
}
# The other fields of GPT2Config, from transformers 2 to 5. They are about training, other heads,
# the tokenizer, or how `generate` samples; none changes the logits.
HARMLESS = """
_name_or_path architectures attn_implementation attn_pdrop bad_words_ids
begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_range
is_decoder label2id layer_norm_epsilon length_penalty max_length min_length n_ctx n_special
no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
output_attentions output_hidden_states output_past output_scores pad_token_id
predict_special_tokens prefix problem_type remove_invalid_values reorder_and_upcast_attn
repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id
summary_activation summary_first_dropout summary_proj_to_labels summary_type
summary_use_proj suppress_tokens task_specific_params temperature tf_legacy_loss
tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
transformers_version typical_p unk_token_id use_bfloat16 use_cache xla_device
"""


def check_hf_config(path: Path) -> None:
    """Reject (UserError) a config.json that does not fit our network; no weights are needed."""
    values = files.read_object(path)
    check(values, "hf", path)
    activation_of(values, "hf", path)


def check(values: dict[str, Any], format: str, where: Path) -> None:
    """Reject (UserError) quantized weights, and a value that is not in FIXED."""
    quantized = values.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "") if isinstance(quantized, dict) else ""
        raise UserError(
            f"{where}: the weights are quantized ({method or 'quantization_config'}). {FULL}"
        )
    for name, supported in FIXED[format].items():
        if name in values:
            _check_one(name, values[name], supported, where)


FULL = (
    "gpt2cli reads full weights only: get the original model, or load this one in transformers, "
    "call dequantize() and save_pretrained()"
)


def _check_one(name: str, value: Any, supported: Iterable[Any], where: Path) -> None:
    if not any(type(value) is type(a) and value == a for a in supported):
        raise UserError(
            f"{where}: {name} is {json.dumps(value)}, but gpt2cli supports only "
            f"{' or '.join(json.dumps(a) for a in supported)}: it is another kind of model"
        )


def activation_of(values: dict[str, Any], format: str, where: Path) -> str | None:
    """Return our name of the activation function, None if no field names it; UserError."""
    field, known = ACTIVATION_FIELDS[format], ACTIVATIONS[format]
    if field not in values:
        return None
    _check_one(field, values[field], known, where)
    return known[values[field]]


def query_scale(values: dict[str, Any], head: int) -> list[float] | None:
    """Return the factor for each layer's queries with which our scaling equals theirs.

    Ours is 1 / sqrt(head) in every layer, head being the width of a head. transformers can leave
    it out (scale_attn_weights false) and divide by the layer's number as well
    (scale_attn_by_inverse_layer_idx). None if theirs is ours.
    """
    plain = values.get("scale_attn_weights", True)
    inverse = values.get("scale_attn_by_inverse_layer_idx", False)
    if plain and not inverse:
        return None
    layers = range(1, 1 + int(values["n_layer"]))
    return [(1.0 if plain else head**0.5) / (layer if inverse else 1) for layer in layers]


def notes(values: dict[str, Any], format: str, n_ctx: int) -> list[str]:
    """Return a note for each ignored field that the user may expect to matter."""
    if format != "hf":
        return []
    said = []
    if values.get(LEFT_OVER, n_ctx) != n_ctx:
        said.append(
            f"config.json: {LEFT_OVER} {values[LEFT_OVER]!r:.20} is ignored, as in transformers: "
            f"the model has {n_ctx} positions"
        )
    if "auto_map" in values:
        said.append(
            "config.json refers to code of its own (auto_map). It is not run: the weights are "
            "read as a plain GPT-2's"
        )
    obeyed = {name for names in SIZE_FIELDS["hf"].values() for name in names}
    obeyed |= {*FIXED["hf"], ACTIVATION_FIELDS["hf"], "quantization_config", "auto_map"}
    obeyed |= {*HARMLESS.split()}
    unknown = [name for name in values if name not in obeyed and not name.startswith("_")]
    if unknown:
        said.append(f"config.json: ignored {few(unknown)}, which transformers' GPT-2 does not have")
    return said
