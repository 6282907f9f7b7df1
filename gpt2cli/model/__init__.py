"""The network: token ids in, logits out.

May import: console, counts, errors, files, flags, machine, options, paths, peers, signals,
tensorflow.
"""
