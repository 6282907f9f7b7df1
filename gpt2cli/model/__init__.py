"""The network: token ids in, logits out.

May import: console, counts, errors, files, flags, locks, machine, options, paths, peers,
signals, tensorflow.
"""
