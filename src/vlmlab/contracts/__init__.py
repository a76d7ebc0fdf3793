"""The contracts every plug-in may import: samples (torch-free) and tensors (Layout, Visual, Batch).

``vlmlab.contracts.sample`` and ``vlmlab.contracts.errors`` never import torch, so that composition
errors, tables and the embedded world stay instant; ``vlmlab.contracts.tensors`` does.
"""
