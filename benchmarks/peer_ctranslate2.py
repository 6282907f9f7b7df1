"""CTranslate2 as a worker: Generator.generate_batch."""

import ctranslate2
import worker


class CTranslate2:
    """A model in float32, bfloat16 (where it knows the processor's) or int8."""

    def __init__(self, folder, kind, cores):
        path = str(folder / f"ctranslate2-{'int8' if kind == 'int8' else 'float32'}")
        self.generator = ctranslate2.Generator(
            path, compute_type=kind, inter_threads=1, intra_threads=cores
        )
        self.versions = worker.versions("ctranslate2")

    def generate(self, prompts, length, greedy, seed):
        """Lists of new ids, one a prompt; below the least length no end token is drawn."""
        ctranslate2.set_random_seed(seed)
        results = self.generator.generate_batch(
            [[str(token) for token in prompt] for prompt in prompts],
            max_length=length,
            min_length=length,
            sampling_topk=1 if greedy else 0,  # 0: from all tokens
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]


if __name__ == "__main__":
    worker.serve(CTranslate2)
