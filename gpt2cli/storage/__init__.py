"""Model folders, run folders and checkpoints: what is on the disk and survives a crash.

May import: model.
"""
