"""Run by transformers' own Python: load Hugging Face folders, print logits and ids as one JSON.

python peer_transformers.py < [{"folder": ..., "ids": [...], "texts": [...], "save": ...}, ...]

A folder without texts has no tokenizer. Each is saved anew, in pieces, as `save`. What a library
says on standard error is for the caller.
"""

import json
import sys

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel


def look_at(folder, ids, texts, save):
    """Logits [T, V] of the ids, the tokenizer's ids of each text, and its decoded end token."""
    network = GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = network(torch.tensor([ids])).logits[0].tolist()
    settings = network.config
    found = {"logits": logits, "special": [settings.bos_token_id, settings.eos_token_id]}
    found["special"].append(settings.pad_token_id)
    found["generation"] = network.generation_config.eos_token_id
    network.save_pretrained(save, max_shard_size="300KB")
    if texts:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found["ids"] = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        tokenizer.save_pretrained(save)
    return found


print(json.dumps([look_at(**job) for job in json.load(sys.stdin)]))
