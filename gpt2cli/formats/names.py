"""The names of tensors in state dicts of Hugging Face, nanoGPT and UER-py, and ours."""

import re

from gpt2cli.errors import UserError
from gpt2cli.formats import settings
from gpt2cli.formats.tensors import StateDict, Stored, few

LAYERS = {"hf": "h.", "nanogpt": "h.", "uer": "encoder.transformer."}  # prefix of a layer's number
TRANSPOSED = ("nanogpt", "uer")  # have the matrices of PyTorch's Linear, [out, in]
# Our name of a weight, without its layer -> the tensors of UER-py that it consists of.
UER_PLACES = {
    "ln_1/g": ("layer_norm_1.gamma",),
    "ln_1/b": ("layer_norm_1.beta",),
    "attn/c_attn/w": tuple(f"self_attn.linear_layers.{i}.weight" for i in range(3)),  # q, k, v
    "attn/c_attn/b": tuple(f"self_attn.linear_layers.{i}.bias" for i in range(3)),
    "attn/c_proj/w": ("self_attn.final_linear.weight",),
    "attn/c_proj/b": ("self_attn.final_linear.bias",),
    "ln_2/g": ("layer_norm_2.gamma",),
    "ln_2/b": ("layer_norm_2.beta",),
    "mlp/c_fc/w": ("feed_forward.linear_1.weight",),
    "mlp/c_fc/b": ("feed_forward.linear_1.bias",),
    "mlp/c_proj/w": ("feed_forward.linear_2.weight",),
    "mlp/c_proj/b": ("feed_forward.linear_2.bias",),
    "wte": ("embedding.word.embedding.weight",),
    "wpe": ("embedding.pos.embedding.weight",),
    "ln_f/g": ("encoder.layer_norm.gamma",),
    "ln_f/b": ("encoder.layer_norm.beta",),
}
# TencentPretrain scripts/convert_tencentpretrain_from_old_to_new.py: names before 2022 -> now
UER_OLD = {
    "embedding.word_embedding.weight": "embedding.word.embedding.weight",
    "embedding.position_embedding.weight": "embedding.pos.embedding.weight",
    "target.output_layer.weight": "target.lm.output_layer.weight",
}
# Older versions of transformers and nanoGPT save the causal mask and its -1e4 beside the weights.
BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
# What torch.compile, DataParallel, FSDP and checkpointing put before or into a weight's name.
WRAPPER = re.compile(
    r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
HEADS = {
    "hf": "lm_head.weight",
    "nanogpt": "lm_head.weight",
    "uer": "target.lm.output_layer.weight",
}
HEAD_OLD = {"lm_head.decoder.weight": "lm_head.weight"}  # microsoft/DialoGPT
# Heads beside the language model's: of trl and trlx, which score a text, and of transformers'
# GPT2DoubleHeadsModel. The logits do not need them.
OTHER_HEAD = re.compile(r"(v_head|value_head|multiple_choice_head)\.")
# Tensors that mean another kind of model -> what it is.
OTHER_KINDS = {
    r"(score|classifier|qa_outputs)\.": "a classifier, whose weights no longer predict text well",
    r".*\.(lora_[AB]|lora_embedding_[AB]|base_layer)\b": (
        "a model with a LoRA adapter that is not merged. Merge it in PEFT with merge_and_unload() "
        "and save_pretrained()"
    ),
    r".*\.(qweight|qzeros|g_idx|absmax|quant_map|SCB|weight_format|weight_packed|weight_scale)$": (
        f"a quantized model. {settings.FULL}"
    ),
}
LEAVES = {"g": "weight", "w": "weight", "b": "bias"}  # the first PyTorch ports kept ours


def format_of(weights: StateDict) -> str:
    """Return the format, hf, nanogpt or uer, that uses these names and shapes."""
    if any(WRAPPER.sub("", name).startswith("embedding.word") for name in weights.tensors):
        return "uer"
    names = unwrapped(weights, "hf", [])
    shape = names["h.0.attn.c_attn.weight"].shape if "h.0.attn.c_attn.weight" in names else ()
    return "nanogpt" if len(shape) == 2 and shape[0] == 3 * shape[1] else "hf"


def unwrapped(weights: StateDict, format: str, notes: list[str]) -> dict[str, Stored]:
    """Return the tensors under their names without the prefixes of programs; add to the notes.

    The table of positions shows the prefix: the layers have the same one, and so does the output
    matrix, apart from `transformer.`. Programs that save a shared tensor once may have the token
    table only as the output matrix (accelerate, safetensors' save_model).

    Raises:
        UserError: two tensors get the same name.
    """
    plain = {name: WRAPPER.sub("", name) for name in weights.tensors}
    if format == "uer":
        plain = {name: UER_OLD.get(new, new) for name, new in plain.items()}
    else:
        plain = {name: _with_usual_leaf(new) for name, new in plain.items()}
        table = next((n for n in plain.values() if re.search(r"(^|\.)wpe\.weight$", n)), "")
        inner = table.removesuffix("wpe.weight")
        outer = inner.removesuffix("transformer.")
        for name, new in plain.items():
            new = new.removeprefix(inner if new.startswith(inner) else outer)
            plain[name] = HEAD_OLD.get(new, new)
        plain = {name: new for name, new in plain.items() if not BUFFER.fullmatch(new)}
        if "wte.weight" not in plain.values():
            plain = {n: "wte.weight" if new == HEADS["hf"] else new for n, new in plain.items()}
        heads = [name for name, new in plain.items() if OTHER_HEAD.match(new)]
        if heads:
            notes.append(
                f"ignored {few(heads)}: such heads score texts, and the logits do not use them"
            )
        plain = {name: new for name, new in plain.items() if not OTHER_HEAD.match(new)}
    found: dict[str, str] = {}
    for name, new in plain.items():
        if new in found:
            raise UserError(
                f"{weights.file} has both {found[new]} and {name}, so it contains two models. Save "
                "one of them alone"
            )
        found[new] = name
    return {new: weights.tensors[name] for new, name in found.items()}


def _with_usual_leaf(name: str) -> str:
    """Return a name with the last part that is used today."""
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.{LEAVES.get(leaf, leaf)}" if stem else name


def places_of(name: str, format: str) -> tuple[str, ...]:
    """Return the tensors in a state dict of a format that our weight `name` consists of.

    There are several where UER-py has separate matrices for query, key and value.
    """
    match = re.fullmatch(r"model/(?:h(\d+)/)?(.+)", name)
    assert match is not None, name
    layer, part = match.groups()
    if format == "uer":
        found = UER_PLACES[part]
    else:
        stem, leaf = part.rsplit("/", 1) if "/" in part else (part, "w")
        found = (f"{stem.replace('/', '.')}.{LEAVES[leaf]}",)
    return found if layer is None else tuple(f"{LAYERS[format]}{layer}.{n}" for n in found)
