"""Run by gpt-2-simple's own Python: continue prompts with a run, or train it on.

python peer_gpt_2_simple.py continue CHECKPOINT_DIR RUN PROMPT LENGTH
python peer_gpt_2_simple.py finetune CHECKPOINT_DIR RUN MODEL_DIR MODEL DATASET STEPS
"""

import json
import sys

import gpt_2_simple as gpt2
import tensorflow as tf
from gpt_2_simple.src import encoder, model, sample


def continue_prompt(checkpoint_dir, run, prompt, length):
    """Print the text that `generate` gives and the ids of its sampler, both greedy."""
    session = gpt2.start_tf_sess()
    gpt2.load_gpt2(session, run_name=run, checkpoint_dir=checkpoint_dir)
    (text,) = gpt2.generate(
        *(session,),
        **dict(run_name=run, checkpoint_dir=checkpoint_dir, prefix=prompt, length=int(length)),
        **dict(temperature=1.0, top_k=1, return_as_list=True),
    )
    folder = f"{checkpoint_dir}/{run}"
    hparams = model.default_hparams()
    with open(f"{folder}/hparams.json") as file:
        hparams.override_from_dict(json.load(file))
    ids = encoder.get_encoder(folder).encode(prompt)
    context = tf.compat.v1.placeholder(tf.int32, [1, None])
    output = sample.sample_sequence(
        hparams=hparams, length=int(length), context=context, batch_size=1, temperature=1, top_k=1
    )
    out = session.run(output, {context: [ids]})[0, len(ids) :].tolist()
    print("RESULT " + json.dumps({"text": text, "ids": out}))


def finetune(checkpoint_dir, run, model_dir, name, dataset, steps):
    """Go on with the run for some steps."""
    gpt2.finetune(
        gpt2.start_tf_sess(),
        dataset,
        **dict(model_name=name, model_dir=model_dir, run_name=run, checkpoint_dir=checkpoint_dir),
        **dict(steps=int(steps), restore_from="latest", sample_every=10**6, print_every=1),
    )


{"continue": continue_prompt, "finetune": finetune}[sys.argv[1]](*sys.argv[2:])
