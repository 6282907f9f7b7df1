"""The network: token ids in, logits out.

May import: console, errors, files, flags, hints, machine, options, tensorflow.
"""
