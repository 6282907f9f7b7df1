"""Write a random model in a tool's own format: convert.py TOOL FOLDER SIZE KINDS [VOCABULARY].

Runs with the Python of that tool. `ours` comes first: it draws the weights and writes each to a
file of the folder `weights`, which the others read. KINDS are precisions with commas between them.
"""

import json
import sys
from pathlib import Path

import numpy as np

SIZES = {  # n_layer, n_head, n_embd, from OpenAI's hparams.json
    "124M": (12, 12, 768),
    "355M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}
N_VOCAB, N_CTX = 50257, 1024
LEAVES = {"g": "weight", "w": "weight", "b": "bias"}


def sizes_of(size):
    """Return the hparams of a size."""
    n_layer, n_head, n_embd = SIZES[size]
    own = {"n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    return {"n_vocab": N_VOCAB, "n_ctx": N_CTX, **own}


def weights_of(size, positions=True):
    """Return the number of a model's weights, with or without the table of positions."""
    n_layer, _, n_embd = SIZES[size]
    layers = n_layer * (12 * n_embd**2 + 13 * n_embd) + 2 * n_embd
    return (N_VOCAB + N_CTX * positions) * n_embd + layers


def ours(folder, size, kinds, vocabulary):
    """models/random, without a vocabulary; models/vocabulary, the same with that of a folder."""
    from gpt2cli.model.network import GPT2
    from gpt2cli.model.sizes import ModelConfig
    from gpt2cli.model.weights import random_weights
    from gpt2cli.storage import checkpoint

    config = ModelConfig(**sizes_of(size))
    network = GPT2(config, random_weights(config))
    checkpoint.save(network, folder / "models/random")
    (folder / "weights").mkdir()
    names = list(network.weights)
    for number, weight in enumerate(network.weights.values()):
        np.save(folder / f"weights/{number}.npy", weight.numpy())
    (folder / "weights/names.json").write_text(json.dumps(names))
    (folder / "models/vocabulary").mkdir()
    files = list((folder / "models/random").iterdir())
    for path in files + [Path(vocabulary) / name for name in ("encoder.json", "vocab.bpe")]:
        (folder / "models/vocabulary" / path.name).symlink_to(path.resolve())
    tokens = np.random.default_rng(0).zipf(1.3, 200_000) % N_VOCAB
    np.savez(folder / "tokens.npz", tokens.astype(np.uint16))


def transformers(folder, size, kinds):
    """A folder for from_pretrained; without dropout, as there is none in ours."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    n_layer, n_head, n_embd = SIZES[size]
    names = {"vocab_size": N_VOCAB, "n_positions": N_CTX}
    sizes = {"n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
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


def ctranslate2(folder, size, kinds):
    """A folder a precision, with its own converter of OpenAI's checkpoints; tokens are numbers."""
    from ctranslate2.converters import openai_gpt2
    from ctranslate2.specs import Activation, TransformerDecoderModelSpec

    n_layer, n_head, _ = SIZES[size]
    stored = ["int8"] * ("int8" in kinds)
    stored += ["float32"] * (kinds != ["int8"])  # it takes torch to write bfloat16
    for precision in stored:
        spec = TransformerDecoderModelSpec.from_config(
            n_layer, n_head, pre_norm=True, activation=Activation.GELUTanh
        )
        openai_gpt2.set_decoder(spec.decoder, _weights(folder), "model")
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
        spec.register_vocabulary([str(index) for index in range(N_VOCAB)])
        spec.validate()
        spec.optimize(quantization=precision)
        (folder / f"ctranslate2-{precision}").mkdir()
        spec.save(str(folder / f"ctranslate2-{precision}"))


def llama(folder, size, kinds):
    """A GGUF file a precision, Q8_0 for int8; the words of its vocabulary are made up."""
    import gguf

    formats = gguf.GGMLQuantizationType
    places = {"ln_1": "attn_norm", "attn/c_attn": "attn_qkv", "attn/c_proj": "attn_output"}
    places |= {"ln_2": "ffn_norm", "mlp/c_fc": "ffn_up", "mlp/c_proj": "ffn_down"}
    top = {"wte": "token_embd.weight", "wpe": "position_embd.weight"}
    top |= {"ln_f/g": "output_norm.weight", "ln_f/b": "output_norm.bias"}
    sizes = sizes_of(size)
    for precision in kinds:
        kind = {"float32": formats.F32, "bfloat16": formats.BF16, "int8": formats.Q8_0}[precision]
        writer = gguf.GGUFWriter(folder / f"{precision}.gguf", "gpt2", use_temp_file=size != "124M")
        writer.add_context_length(sizes["n_ctx"])
        writer.add_embedding_length(sizes["n_embd"])
        writer.add_feed_forward_length(4 * sizes["n_embd"])
        writer.add_block_count(sizes["n_layer"])
        writer.add_head_count(sizes["n_head"])
        writer.add_layer_norm_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([f"t{index}" for index in range(N_VOCAB)])
        writer.add_token_types([gguf.TokenType.NORMAL] * N_VOCAB)
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
            used = formats.F32 if small else kind
            data = gguf.quants.quantize(np.ascontiguousarray(weight), used)
            writer.add_tensor(their, data, raw_dtype=used)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _weights(folder):
    """OpenAI's names -> arrays, those of a convolution with a window of one as matrices.

    They are mapped: memory holds what a tool reads or changes, the files stay.
    """
    found = {}
    for number, name in enumerate(json.loads((folder / "weights/names.json").read_text())):
        array = np.load(folder / f"weights/{number}.npy", mmap_mode="c")
        found[name] = array[0] if array.ndim == 3 else array
    return found


if __name__ == "__main__":
    tool = {f.__name__: f for f in (ours, transformers, ctranslate2, llama)}[sys.argv[1]]
    tool(Path(sys.argv[2]), sys.argv[3], sys.argv[4].split(","), *sys.argv[5:])
