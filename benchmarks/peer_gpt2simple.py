"""gpt-2-simple as a worker: its sample_sequence, and `finetune` as a user calls it."""

import contextlib
import io
import re

import gpt_2_simple
import numpy as np
import tensorflow as tf
import worker
from gpt_2_simple.src import model, sample


class Gpt2Simple:
    """A model in float32, its only precision."""

    def __init__(self, folder, kind, cores):
        self.folder, self.graphs = folder, {}
        self.session = gpt_2_simple.start_tf_sess()
        self.hparams = model.default_hparams()
        self.hparams.override_from_dict(
            {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
        )
        self.loaded = False
        self.versions = worker.versions("gpt-2-simple", "tensorflow")

    def generate(self, prompts, length, greedy, seed):
        """Lists of new ids, one a prompt. Its `generate` builds the graph anew in every call; this
        builds one for each shape, which is faster."""
        if not self.loaded:
            gpt_2_simple.load_gpt2(
                self.session, model_name="random", model_dir=str(self.folder / "models")
            )
            self.loaded = True
        key = (len(prompts), length, greedy)
        if key not in self.graphs:
            context = tf.compat.v1.placeholder(tf.int32, [len(prompts), None])
            ids = sample.sample_sequence(
                hparams=self.hparams,
                length=length,
                context=context,
                batch_size=len(prompts),
                top_k=int(greedy),
            )
            self.graphs[key] = context, ids
        context, ids = self.graphs[key]
        rows = self.session.run(ids, {context: np.array(prompts, np.int32)})
        return rows[:, len(prompts[0]) :].tolist()

    def train(self, steps, length):
        """Seconds of each step on one row of its 1,024 tokens, from the lines that it prints."""
        assert length == 1024, "gpt-2-simple has no other length"
        with contextlib.redirect_stdout(io.StringIO()) as out:
            gpt_2_simple.finetune(
                self.session,
                str(self.folder / "tokens.npz"),
                steps=steps,
                model_name="vocabulary",
                model_dir=str(self.folder / "models"),
                checkpoint_dir=str(self.folder / "gpt2simple"),
                learning_rate=2e-5,
                accumulate_gradients=1,
                restore_from="fresh",
                sample_every=10**9,
                save_every=10**9,
            )
        times = [0.0, *map(float, re.findall(r"^\[\d+ \| ([\d.]+)\]", out.getvalue(), re.M))]
        return np.diff(times).tolist()


if __name__ == "__main__":
    worker.serve(Gpt2Simple)
