"""Models of other programs, read and written.

May import: text.
"""
