"""Digests of the bits of tensors, the same on every device."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def fingerprint(tensor: Tensor) -> str:
    """32 hexadecimal digits of the tensor's bits (blake2b), whatever its device and strides."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).hexdigest()
