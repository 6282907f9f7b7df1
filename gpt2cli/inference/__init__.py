"""A loaded model at work: it scores texts and continues them.

May import: text.
"""
