"""How the network is run: LiteRT on a CPU, XLA on a GPU.

May import: inference.sampling, model.
"""
