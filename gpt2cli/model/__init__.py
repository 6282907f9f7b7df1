"""The network: token ids in, logits out.

May import: console, errors, files, flags, machine, options, peers, signals, tensorflow.
"""
