"""Models from elsewhere: released ones, mirrors, the Hugging Face hub.

May import: storage.
"""
