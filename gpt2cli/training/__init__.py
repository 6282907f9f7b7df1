"""A training run: its steps, its optimizer, its devices and hosts.

May import: inference.
"""
