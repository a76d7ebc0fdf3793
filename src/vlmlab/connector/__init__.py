"""Connectors: what the encoder saw -> visual tokens of the LM's width, ``(Visual, instruction) -> (I, M, D)``."""
