"""Model folders, run folders and checkpoints: what lies on the disk and survives a crash.

May import: model.
"""
