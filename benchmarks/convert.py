"""Write the random 124M model in a tool's own format: convert.py TOOL FOLDER [VOCABULARY].

Runs with the Python of that tool. `ours` comes first: it draws the weights and writes weights.npz,
under OpenAI's names, which the others read.
"""

import sys
from pathlib import Path

import numpy as np

SIZES = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
LEAVES = {"g": "weight", "w": "weight", "b": "bias"}


def ours(folder, vocabulary):
    """models/random, without a vocabulary; models/vocabulary, the same with that of a folder."""
    from gpt2cli.model import network as model
    from gpt2cli.model.sizes import ModelConfig
    from gpt2cli.model.weights import random_weights
    from gpt2cli.storage import checkpoint

    sizes = ModelConfig(**SIZES)
    network = model.GPT2(sizes, random_weights(sizes))
    checkpoint.save(network, folder / "models/random")
    np.savez(folder / "weights.npz", **{n: w.numpy() for n, w in network.weights.items()})
    (folder / "models/vocabulary").mkdir()
    files = list((folder / "models/random").iterdir())
    for path in files + [Path(vocabulary) / name for name in ("encoder.json", "vocab.bpe")]:
        (folder / "models/vocabulary" / path.name).symlink_to(path.resolve())
    tokens = np.random.default_rng(0).zipf(1.3, 200_000) % SIZES["n_vocab"]
    np.savez(folder / "tokens.npz", tokens.astype(np.uint16))


def transformers(folder):
    """A folder for from_pretrained; without dropout, as there is none in ours."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    names = {"vocab_size": SIZES["n_vocab"], "n_positions": SIZES["n_ctx"]}
    sizes = {name: SIZES[name] for name in ("n_embd", "n_head", "n_layer")}
    model = GPT2LMHeadModel(GPT2Config(**names, **sizes, **drops))
    state = {}
    for name, weight in _weights(folder).items():
        place, _, leaf = name.removeprefix("model/").rpartition("/")
        parts = [place, LEAVES[leaf]] if place else [leaf, "weight"]
        their = ".".join(parts).replace("/", ".").replace("h", "h.", place.startswith("h"))
        state[f"transformer.{their}"] = torch.from_numpy(weight)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    model.load_state_dict(state)
    model.save_pretrained(folder / "transformers")


def ctranslate2(folder):
    """A folder a precision, with its own converter of OpenAI's checkpoints; tokens are numbers."""
    from ctranslate2.converters import openai_gpt2
    from ctranslate2.specs import Activation, TransformerDecoderModelSpec

    for precision in ("float32", "int8"):  # it takes torch to write bfloat16
        spec = TransformerDecoderModelSpec.from_config(
            SIZES["n_layer"], SIZES["n_head"], pre_norm=True, activation=Activation.GELUTanh
        )
        openai_gpt2.set_decoder(spec.decoder, _weights(folder), "model")
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
        spec.register_vocabulary([str(index) for index in range(SIZES["n_vocab"])])
        spec.validate()
        spec.optimize(quantization=precision)
        (folder / f"ctranslate2-{precision}").mkdir()
        spec.save(str(folder / f"ctranslate2-{precision}"))


def llama(folder):
    """A GGUF file a precision, Q8_0 for int8; the words of its vocabulary are made up."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    places = {"ln_1": "attn_norm", "attn/c_attn": "attn_qkv", "attn/c_proj": "attn_output"}
    places |= {"ln_2": "ffn_norm", "mlp/c_fc": "ffn_up", "mlp/c_proj": "ffn_down"}
    top = {"wte": "token_embd.weight", "wpe": "position_embd.weight"}
    top |= {"ln_f/g": "output_norm.weight", "ln_f/b": "output_norm.bias"}
    for precision, kind in (("float32", kinds.F32), ("bfloat16", kinds.BF16), ("int8", kinds.Q8_0)):
        writer = gguf.GGUFWriter(folder / f"{precision}.gguf", "gpt2")
        writer.add_context_length(SIZES["n_ctx"])
        writer.add_embedding_length(SIZES["n_embd"])
        writer.add_feed_forward_length(4 * SIZES["n_embd"])
        writer.add_block_count(SIZES["n_layer"])
        writer.add_head_count(SIZES["n_head"])
        writer.add_layer_norm_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([f"t{index}" for index in range(SIZES["n_vocab"])])
        writer.add_token_types([gguf.TokenType.NORMAL] * SIZES["n_vocab"])
        writer.add_token_merges(["t 0"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        for name, weight in _weights(folder).items():
            name = name.removeprefix("model/")
            if name in top:
                their = top[name]
            else:
                layer, place = name.split("/", 1)
                place, leaf = place.rsplit("/", 1)
                their = f"blk.{layer[1:]}.{places[place]}.{LEAVES[leaf]}"
                weight = weight.T if weight.ndim == 2 else weight
            small = weight.ndim == 1 or name == "wpe"  # llama.cpp takes these in float32 only
            used = kinds.F32 if small else kind
            data = gguf.quants.quantize(np.ascontiguousarray(weight), used)
            writer.add_tensor(their, data, raw_dtype=used)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _weights(folder):
    """OpenAI's names -> arrays, those of a convolution with a window of one as matrices."""
    with np.load(folder / "weights.npz") as file:
        return {name: file[name][0] if file[name].ndim == 3 else file[name] for name in file}


if __name__ == "__main__":
    tool = {f.__name__: f for f in (ours, transformers, ctranslate2, llama)}[sys.argv[1]]
    tool(Path(sys.argv[2]), *sys.argv[3:])
