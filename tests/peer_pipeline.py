"""Run by transformers' own Python: continue prompts with the text-generation pipeline.

python peer_pipeline.py < [{"folder": ..., "prompts": [...], "length": ..., "bert": ...}, ...]

Prints the ids and the text of each continuation as one JSON. With "bert" the tokenizer is a
BertTokenizer, as in UER-py's documentation, and the prompt says where [CLS] is.
"""

import json
import sys

from transformers import AutoTokenizer, BertTokenizer, GPT2LMHeadModel, TextGenerationPipeline


def continued(folder, prompts, length, bert=False):
    """Return [ids, text] of the likeliest continuation of each prompt."""
    kind = BertTokenizer if bert else AutoTokenizer
    tokenizer = kind.from_pretrained(folder)
    network = GPT2LMHeadModel.from_pretrained(folder).eval()
    pipeline = TextGenerationPipeline(model=network, tokenizer=tokenizer)
    options = {"do_sample": False, "max_new_tokens": length, "pad_token_id": 0}
    if bert:
        options["add_special_tokens"] = False
    found = []
    for prompt in prompts:
        (answer,) = pipeline(prompt, return_full_text=False, **options)
        read = tokenizer(prompt, add_special_tokens=not bert).input_ids
        (whole,) = pipeline(prompt, return_tensors=True, **options)
        found.append([whole["generated_token_ids"][len(read) :], answer["generated_text"]])
    return found


print(json.dumps([continued(**job) for job in json.load(sys.stdin)]))
