"""A file of prompts, answered line by line; an interrupted job resumes.

May import: inference.
"""
