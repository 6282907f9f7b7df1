"""Text to token ids to batches, and back.

May import: storage.
"""
