"""The HTTP server: a page and the API of OpenAI's completions.

May import: inference.
"""
