"""llama.cpp as a worker, through the C interface in llama-cpp-python: its Python class takes one
sequence only, llama_decode takes several."""

import llama_cpp as lib
import worker


class Llama:
    """A model in float32, bfloat16 or int8 (Q8_0); the cache is float32 for float32, else the
    default, float16."""

    def __init__(self, folder, kind, cores):
        lib.llama_backend_init()
        path = str(folder / f"{kind}.gguf").encode()
        self.model = lib.llama_model_load_from_file(path, lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"{kind}.gguf was not read")
        self.kind, self.cores, self.context, self.shape = kind, cores, None, None
        self.versions = worker.versions("llama-cpp-python", "gguf")

    def generate(self, prompts, length, greedy, seed):
        """Lists of new ids, one a prompt; whatever they are, none ends early."""
        rows, width = len(prompts), len(prompts[0])
        self._prepare(rows, width + length)
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        first = lib.llama_sampler_init_greedy() if greedy else lib.llama_sampler_init_dist(seed)
        lib.llama_sampler_chain_add(chain, first)
        batch = lib.llama_batch_init(rows * width, 0, 1)
        try:
            tokens, position = prompts, 0
            new = [[] for _ in prompts]
            for _ in range(length):
                last = self._decode(batch, tokens, position)
                position += len(tokens[0])
                drawn = [lib.llama_sampler_sample(chain, self.context, index) for index in last]
                tokens = [[token] for token in drawn]
                for row, token in zip(new, drawn, strict=True):
                    row.append(token)
        finally:
            lib.llama_batch_free(batch)
            lib.llama_sampler_free(chain)
        return new

    def _prepare(self, rows, length):
        """The context for so many sequences of this length, kept for the next call."""
        if self.shape == (rows, length):
            return
        if self.context:
            lib.llama_free(self.context)
        params = lib.llama_context_default_params()
        params.n_ctx = rows * -(-length // 256) * 256  # of all rows together; 256: its granularity
        params.n_seq_max = rows
        params.n_threads = params.n_threads_batch = self.cores
        if self.kind == "float32":
            params.type_k = params.type_v = lib.GGML_TYPE_F32
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"no context for {rows} x {length}")
        self.shape = (rows, length)

    def _decode(self, batch, tokens, position):
        """Read some tokens a row, from this position on; where in the batch each row ends."""
        number, last = 0, []
        for row, ids in enumerate(tokens):
            for offset, token in enumerate(ids):
                batch.token[number], batch.pos[number] = token, position + offset
                batch.n_seq_id[number], batch.seq_id[number][0] = 1, row
                batch.logits[number] = offset == len(ids) - 1
                number += 1
            last.append(number - 1)
        batch.n_tokens = number
        status = lib.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        return last


if __name__ == "__main__":
    worker.serve(Llama)
