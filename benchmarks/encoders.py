"""Encode a text file into a .npy of ids with tiktoken's or tokenizers' own batch call.

    encoders.py tiktoken|tokenizers|wordpiece FOLDER IN OUT THREADS

Prints JSON: tokens, and the seconds from after the imports until OUT is written, the vocabulary's
loading included (and told apart). The text is given in pieces that begin at a line's start, so a
few ids at their borders may differ from those of the whole.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

PIECE = 2**16  # characters
# openai/gpt-2 src/encoder.py, in the spelling of tiktoken_ext/openai_public.py
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def pieces(text):
    """The text, cut at the ends of lines."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        yield text[start:end]
        start = end


def with_tiktoken(folder, threads):
    """A function from pieces to lists of ids; the ranks are those of OpenAI's two files."""
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )
    return lambda texts: encoding.encode_ordinary_batch(texts, num_threads=threads)


def with_tokenizers(folder, threads):
    """The same; its threads are set by the environment."""
    made = tokenizers.ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    return lambda texts: [e.ids for e in made._tokenizer.encode_batch_fast(texts)]


def with_wordpiece(folder, threads):
    """The same for a BERT vocabulary, without [CLS] and [SEP]."""
    made = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"))
    return lambda texts: [
        e.ids for e in made._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]


if __name__ == "__main__":
    kind, folder, source, target, threads = sys.argv[1:]
    os.environ["RAYON_NUM_THREADS"] = threads
    if kind == "tiktoken":
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    else:
        import tokenizers
    makers = {"tiktoken": with_tiktoken, "tokenizers": with_tokenizers, "wordpiece": with_wordpiece}
    begun = time.perf_counter()
    encode = makers[kind](Path(folder), int(threads))
    loading = time.perf_counter() - begun
    parts = encode(list(pieces(Path(source).read_text(encoding="utf-8"))))
    ids = np.concatenate([np.array(part, np.uint16) for part in parts])
    np.save(target, ids)
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "loading": loading, "tokens": len(ids)}))
