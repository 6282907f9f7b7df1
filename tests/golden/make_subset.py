"""Cut tests/golden out of the full set of results of the original programs.

python tests/golden/make_subset.py FULL

FULL is the folder of full results. The vocabularies of GPT-2 and of Google's Chinese BERT are
read from FULL/../data. README.md beside this file says why each cut keeps the original numbers.
Needs torch, and transformers 5.23.0, which runs the cut GPT-2 again.
"""

import json
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import regex
import safetensors.numpy
import tensorflow as tf
import torch
from transformers import GPT2LMHeadModel

HERE = Path(__file__).parent
GPT2 = "a-l2-h4-e16-c96"
GPT2_ML = "a-clue-l2-h3-e24-p80"
UER = "a-l2-h3-e24-c128"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# openai/gpt-2 src/encoder.py
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# bytes_to_unicode of the same file: a byte as a vocabulary file spells it
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = sorted(set(range(256)) - set(PRINTABLE))
CHAR_OF = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
NOT_OURS = ("床前明月光", "The quick brown fox", "SolidGoldMagikarp", " SolidGoldMagikarp")


# Files


def read_lines(path):
    """The cases of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_text(name, text):
    path = HERE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


def write_json(name, value, **options):
    write_text(name, json.dumps(value, ensure_ascii=False, **options) + "\n")


def write_cases(name, cases):
    write_text(name, "".join(json.dumps(case) + "\n" for case in cases))


def write_checkpoint(prefix, tensors):
    prefix.parent.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tensors[name] for name in names],
    )


def read_checkpoint(prefix):
    reader = tf.train.load_checkpoint(str(prefix))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


# Models: only the rows of the token embedding that the chosen results name


class Cut:
    """The ids that a cut model keeps: an old id becomes its place among them."""

    def __init__(self, expected, sequences, prompts, ids_of_prompt, others=()):
        self.expected, self.sequences, self.prompts = expected, sequences, prompts
        self.ids_of_prompt = ids_of_prompt  # the keys of an array of generated ids
        self.columns = np.arange(0, len(expected["cols"]), 4)
        arrays = [np.array(others), expected["cols"][self.columns]]
        arrays += [expected[f"seq{i}_tokens"] for i in sequences]
        arrays += [expected[f"greedy{j}_{key}"] for j in prompts for key in self.keys()]
        self.kept = np.unique(np.concatenate(arrays)).astype(np.int64)

    def keys(self):
        return ("prompt", *self.ids_of_prompt)

    def map(self, ids):
        """Old ids -> new ids; ids below 0 stay."""
        places = np.searchsorted(self.kept, np.maximum(ids, 0))
        assert np.array_equal(self.kept[places][np.asarray(ids) >= 0], np.extract(ids >= 0, ids))
        return np.where(ids >= 0, places, ids).astype(np.int32)

    def rows(self, array, n_vocab):
        """The kept rows of an array with one row per token; any other array as it is."""
        return array[self.kept] if array.ndim and array.shape[0] == n_vocab else array

    def results(self, *more):
        """The results for the chosen sequences and prompts, in new ids.

        `more` are the keys, after `seqI_`, of further arrays with one column per id in `cols`.
        """
        found = {"cols": self.map(self.expected["cols"][self.columns])}
        found |= {"n_seq": len(self.sequences), "n_greedy": len(self.prompts)}
        for new, old in enumerate(self.sequences):
            tokens = self.expected[f"seq{old}_tokens"]
            found[f"seq{new}_tokens"] = self.map(tokens)
            for key in ("logits_cols", *more):
                found[f"seq{new}_{key}"] = self.expected[f"seq{old}_{key}"][:, self.columns]
            # the logit of each next token, which the original's loss is made of
            log_sums, nats = self.expected[f"seq{old}_lse"], self.expected[f"seq{old}_nll"]
            found[f"seq{new}_target_logits"] = (log_sums[:-1] - nats).astype(np.float32)
        for new, old in enumerate(self.prompts):
            for key in self.keys():
                found[f"greedy{new}_{key}"] = self.map(self.expected[f"greedy{old}_{key}"])
        return found

    def vocabulary(self, tokens):
        """vocab.txt of the kept ids."""
        return "".join(f"{tokens[index]}\n" for index in self.kept)


def cut_gpt2(full):
    """OpenAI's checkpoint and the same weights in transformers' layout."""
    expected = np.load(full / "gpt2-openai" / GPT2 / "expected.npz")
    beams = range(int(expected["n_beam"]))
    ends = [int(expected[f"beam{j}_eos"]) for j in beams]
    others = [*(end for end in ends if end >= 0), 50256]
    others += [token for j in beams for token in expected[f"beam{j}_prompt"]]
    cut = Cut(expected, [0, 1, 2, 3, 6, 7], range(6), ("ids",), others)

    openai = HERE / "gpt2-openai" / GPT2
    tensors = read_checkpoint(full / "gpt2-openai" / GPT2 / "model.ckpt")
    write_checkpoint(
        openai / "model.ckpt", {name: cut.rows(value, 50257) for name, value in tensors.items()}
    )
    sizes = json.loads((full / "gpt2-openai" / GPT2 / "hparams.json").read_text())
    write_json(f"gpt2-openai/{GPT2}/hparams.json", sizes | {"n_vocab": len(cut.kept)})
    shutil.copyfile(full / "gpt2-openai" / GPT2 / "checkpoint", openai / "checkpoint")

    source, hf = full / "gpt2-hf" / GPT2, HERE / "gpt2-hf" / GPT2
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": len(cut.kept)}
    config |= {"bos_token_id": len(cut.kept) - 1, "eos_token_id": len(cut.kept) - 1}
    write_json(f"gpt2-hf/{GPT2}/config.json", config, indent=1)
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    tensors = {name: cut.rows(value, 50257) for name, value in tensors.items()}
    safetensors.numpy.save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    found = cut.results()
    found |= transformers_results(cut, found, hf)
    np.savez_compressed(openai / "expected.npz", **found)


def transformers_results(cut, found, folder):
    """Losses and beams, which depend on every id: transformers' own, of the cut model, in float64.

    The logits must be those of the full results.
    """
    network = GPT2LMHeadModel.from_pretrained(folder).eval()
    single, double = network, GPT2LMHeadModel.from_pretrained(folder).double().eval()
    more = {}
    for i in range(len(cut.sequences)):
        tokens = torch.tensor(found[f"seq{i}_tokens"][None].astype(np.int64))
        with torch.no_grad():
            logits = double(tokens).logits[0]
        columns = logits[:, found["cols"].tolist()].numpy()
        np.testing.assert_allclose(columns, found[f"seq{i}_logits_cols"], atol=2e-6)
        more[f"seq{i}_lse"] = torch.logsumexp(logits, -1).numpy()
        nats = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:])
        more[f"seq{i}_loss"] = nats.item()  # NaN for one token
    more["n_beam"] = int(cut.expected["n_beam"])
    for j in range(more["n_beam"]):
        case = {
            key: cut.expected[f"beam{j}_{key}"]
            for key in ("prompt", "eos", "num_beams", "max_new_tokens", "length_penalty")
        }
        case["prompt"], case["eos"] = cut.map(case["prompt"]), cut.map(case["eos"])
        ids, scores = beams_of(double, case)
        assert np.array_equal(ids, beams_of(single, case)[0])
        case |= {"ids": ids, "lengths": (ids >= 0).sum(-1), "scores": scores}
        more |= {f"beam{j}_{key}": value for key, value in case.items()}
    return more


def beams_of(network, case):
    """The three best continuations, padded with -1, and their scores."""
    prompt = torch.tensor(case["prompt"][None].astype(np.int64))
    end = int(case["eos"]) if case["eos"] >= 0 else None
    network.generation_config.eos_token_id = end
    with torch.no_grad():
        found = network.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            num_beams=int(case["num_beams"]),
            num_return_sequences=3,
            max_new_tokens=int(case["max_new_tokens"]),
            length_penalty=float(case["length_penalty"]),
            early_stopping=False,
            eos_token_id=end,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    ids = found.sequences[:, prompt.shape[1] :].numpy().astype(np.int32)
    for row in ids:
        ends = np.flatnonzero(row == end)
        row[ends[0] + 1 if len(ends) else len(row) :] = -1
    return ids, found.sequences_scores.numpy()


def cut_gpt2_ml(full, data):
    source = full / "gpt2_ml" / GPT2_ML
    tokens = (data / "bert-zh" / "clue-vocab.txt").read_text(encoding="utf-8").split("\n")
    expected = np.load(source / "expected.npz")
    others = [tokens.index(token) for token in SPECIAL]
    others += [int(expected["stop_eos"]), *expected["stop_ids"]]
    cut = Cut(expected, [0, 1, 2, 3, 6], [1, 3, 6], ("ids_ban0", "ids_noban"), others)
    (index,) = source.glob("*.index")
    tensors = read_checkpoint(index.with_suffix(""))
    write_checkpoint(
        HERE / "gpt2_ml" / GPT2_ML / index.stem,
        {name: cut.rows(value, len(tokens)) for name, value in tensors.items()},
    )
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": len(cut.kept)}
    write_json(f"gpt2_ml/{GPT2_ML}/config.json", config, indent=1)
    write_text("gpt2_ml/vocab.txt", cut.vocabulary(tokens))
    found = cut.results()
    found |= {key: cut.map(expected[key]) for key in ("stop_prompt", "stop_eos", "stop_ids")}
    found["stop_min_len"] = expected["stop_min_len"]
    np.savez_compressed(HERE / "gpt2_ml" / GPT2_ML / "expected.npz", **found)


def cut_uer(full, tokens):
    source, target = full / "uer" / UER, HERE / "uer" / UER
    expected = np.load(source / "expected.npz")
    others = [tokens.index(token) for token in SPECIAL]
    cut = Cut(expected, [0, 1, 2, 3], [0, 1, 3], ("ids",), others)
    target.mkdir(parents=True, exist_ok=True)
    state = torch.load(source / "model.bin", weights_only=True)
    state = {name: cut.rows(tensor.numpy(), len(tokens)) for name, tensor in state.items()}
    safetensors.numpy.save_file(state, target / "model.safetensors")  # to read it without torch
    shutil.copyfile(source / "config.json", target / "config.json")
    write_text("uer/vocab.txt", cut.vocabulary(tokens))
    found = cut.results("hf_plain_logits_cols", "hf_exact_logits_cols")
    np.savez_compressed(target / "expected.npz", **found)


# Texts: only the tokens that could be found in the chosen texts


def chosen(cases, count, length):
    """The first short cases of each group, none of them quoted from elsewhere."""
    groups = {}
    for case in cases:
        if len(case["text"]) <= length and case["text"] not in NOT_OURS:
            groups.setdefault(case["group"], []).append(case)
    return [case for group in groups.values() for case in group[:count]]


def cut_bpe(full, data):
    """Every token whose bytes stand somewhere in a piece of the texts, with the merges of it."""
    cases = chosen(read_lines(full / "bpe" / "cases.jsonl"), count=5, length=30)
    special = read_lines(full / "bpe" / "special_cases.jsonl")
    decoded = [c for c in read_lines(full / "bpe" / "decode_cases.jsonl") if len(c["ids"]) <= 5]
    write_cases("bpe/cases.jsonl", cases)
    write_cases("bpe/special_cases.jsonl", special)
    write_cases("bpe/decode_cases.jsonl", decoded)
    texts = [case["text"] for case in cases + special]
    texts += [path.read_text() for path in sorted((full / "nshepperd_npz").glob("text/*.txt"))]
    texts += [" the", "hello", "<|endoftext|>"]
    pieces = {piece for text in texts for piece in regex.findall(PIECES, text)}
    spelled = "\n".join("".join(CHAR_OF[b] for b in piece.encode()) for piece in sorted(pieces))
    wanted = {index for case in decoded for index in case["ids"]}
    vocab = json.loads((data / "gpt2" / "encoder.json").read_text(encoding="utf-8"))
    kept = {
        token: index
        for token, index in vocab.items()
        if len(token) == 1 or token in spelled or index in wanted or index == 50256
    }
    merges = (data / "gpt2" / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    merges = [
        line for line in merges[1:] if line and {line.replace(" ", ""), *line.split()} <= set(kept)
    ]
    write_json("bpe/encoder.json", kept, separators=(",", ":"))
    write_text("bpe/vocab.bpe", "\n".join(["#version: 0.2", *merges, ""]))


def cut_wordpiece(full, tokens):
    """Every token whose letters stand somewhere in the texts, as {token: id}."""
    cases = chosen(read_lines(full / "wordpiece" / "cases.jsonl"), count=5, length=30)
    divergent = [
        c for c in read_lines(full / "wordpiece" / "divergent_cases.jsonl") if len(c["text"]) <= 30
    ]
    keys = ("group", "text", "ids", "tokens")
    write_cases("wordpiece/cases.jsonl", [{key: case[key] for key in keys} for case in cases])
    write_cases("wordpiece/divergent_cases.jsonl", divergent)
    texts = [case["text"] for case in cases + divergent] + lm_corpus(full)
    plain = [unicodedata.normalize("NFD", text.lower()) for text in texts]
    plain = ["".join(c for c in text if unicodedata.category(c) != "Mn") for text in plain]
    searched = "\n".join([*texts, *(text.lower() for text in texts), *plain])
    kept = {}
    for index, token in enumerate(tokens):
        letters = token.removeprefix("##") if len(token) > 2 else token
        if letters in searched or token in SPECIAL or index == len(tokens) - 1:
            kept[token] = index
    write_json("wordpiece/vocab.json", kept, separators=(",", ":"))


LINES = (0, 1, 4, 5, 10, 20, 30, 38, 39)  # one character; longer than 128; the last, unterminated


def lm_corpus(full):
    """The chosen lines of UER's corpus."""
    lines = (full / "uer" / "lm_data" / "corpus.txt").read_text(encoding="utf-8").split("\n")
    return [lines[number] for number in LINES]


def cut_lm_data(full):
    """The chosen lines, and the instances that UER made of them: it packs no two lines together."""
    write_text("uer/lm_data/corpus.txt", "\n".join(lm_corpus(full)))
    whole = json.loads((full / "uer" / "lm_data" / "instances.json").read_text())
    found = {}
    for variant, lengths in whole.items():
        for length, result in lengths.items():
            assert counted(result["instances"], int(length)) == result
            documents = []
            for instance in result["instances"]:
                documents += [[]] if instance["src"][0] == 101 else []  # [CLS] begins a document
                documents[-1].append(instance)
            assert len(documents) == 39 + (variant == "with_final_newline")
            kept = [i for n in LINES if n < len(documents) for i in documents[n]]
            found.setdefault(variant, {})[length] = counted(kept, int(length))
    write_json("uer/lm_data/instances.json", found, separators=(",", ":"))


def counted(instances, length):
    """Instances with their counts as in the full results."""
    return {
        "instances": instances,
        "n_instances": len(instances),
        "loss_positions": sum(min(i["seg_pos"], length) for i in instances),
        "loss_positions_target_nonzero": sum(sum(t != 0 for t in i["tgt"]) for i in instances),
    }


def main(full):
    data = full.parent / "data"
    tokens = (data / "bert-zh" / "google_zh_vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    for folder in ("bpe", "gpt2-hf", "gpt2-openai", "gpt2_ml", "nshepperd_npz", "uer", "wordpiece"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    (HERE / "gpt2-hf" / GPT2).mkdir(parents=True)
    cut_gpt2(full)
    cut_gpt2_ml(full, data)
    cut_uer(full, tokens)
    cut_lm_data(full)
    cut_bpe(full, data)
    cut_wordpiece(full, tokens)
    shutil.copytree(full / "nshepperd_npz", HERE / "nshepperd_npz")
    for path in sorted(path for path in HERE.rglob("*") if path.is_file()):
        path.chmod(0o644)
        print(f"{path.stat().st_size:7,} {path.relative_to(HERE)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
