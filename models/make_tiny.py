#!/usr/bin/env python3
"""Remake models/tiny: vocabulary and weights from the text of Python's own help, pydoc_data.topics.

    python models/make_tiny.py            # about a quarter of an hour on two cores

The text (some 470 kB of English about Python) comes with every Python installation, so nothing
has to be fetched. The vocabulary is trained as `gpt2cli vocab` does it, the weights with
gpt2cli from random ones; nothing of OpenAI's release is in it.
"""

import json
import shutil
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import gpt2cli
from gpt2cli.commands import vocab
from gpt2cli.model import network as model
from gpt2cli.model.sizes import ModelConfig
from gpt2cli.storage import checkpoint

TINY = Path(__file__).parent / "tiny"
SIZES = ModelConfig(n_vocab=2048, n_ctx=256, n_embd=160, n_head=5, n_layer=4)
STEPS = 900


def main():
    """Make the folder anew."""
    texts = [topics[name].strip() + "\n" for name in sorted(topics)]
    vocab.write(TINY, vocab.train_bpe(["\n".join(texts)], SIZES.n_vocab))
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        shutil.copytree(TINY, scratch / "models" / "tiny", dirs_exist_ok=True)
        checkpoint.save(model.GPT2(SIZES, model.random_weights(SIZES)), scratch / "models" / "tiny")
        corpus = scratch / "topics.jsonl"
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        corpus.write_text("".join(lines), encoding="utf-8")
        run = gpt2cli.train(
            dataset=corpus,
            model_name="tiny",
            models_dir=scratch / "models",
            checkpoint_dir=scratch / "checkpoint",
            sample_dir=scratch / "samples",
            steps=STEPS,
            batch_size=16,
            learning_rate=0.002,
            lr_schedule="cosine",
            warmup_steps=50,
            optimizer="adamw",
            weight_decay=0.3,
            clip_norm=1.0,
            sample_every=STEPS,
            sample_length=100,
            seed=1,
        )
        checkpoint.save(checkpoint.load(run), TINY)


if __name__ == "__main__":
    main()
