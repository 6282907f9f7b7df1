"""transformers on PyTorch as a worker: `generate`, and a plain training loop with fused AdamW."""

import contextlib
import time

import torch
import worker
from transformers import GPT2LMHeadModel


class Transformers:
    """A model in float32 or bfloat16.

    Kinds of training: "float32"; "bfloat16 (autocast)", float32 weights and torch.autocast;
    "bfloat16 (whole)", weights and optimizer in bfloat16 as well, which loses small updates;
    ", recomputed" after these is gradient checkpointing.
    """

    def __init__(self, folder, kind, cores):
        torch.set_num_threads(cores)
        whole = kind.startswith("bfloat16") and "autocast" not in kind
        dtype = torch.bfloat16 if whole else torch.float32
        self.model = GPT2LMHeadModel.from_pretrained(folder / "transformers", dtype=dtype)
        self.model.eval()
        self.kind = kind
        self.versions = worker.versions("transformers", "torch")

    def generate(self, prompts, length, greedy, seed):
        """Lists of new ids, one a prompt; no end token, so that none ends early."""
        torch.manual_seed(seed)
        ids = torch.tensor(prompts)
        chosen = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}
        self.model.generation_config.eos_token_id = None
        with torch.inference_mode():
            rows = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, **chosen
            )
        return rows[:, ids.shape[1] :].tolist()

    def train(self, steps, length):
        """Seconds of each step on one row of `length` tokens."""
        self.model.train()
        if "recomputed" in self.kind:
            self.model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-5, fused=True)
        seconds = []
        for _ in range(steps):
            begun = time.perf_counter()
            ids = torch.randint(self.model.config.vocab_size, (1, length))
            cast = torch.autocast("cpu", torch.bfloat16)
            with cast if "autocast" in self.kind else contextlib.nullcontext():
                loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            seconds.append(time.perf_counter() - begun)
        return seconds


if __name__ == "__main__":
    worker.serve(Transformers)
