"""Operations on tensors without values, each asked of torch once: layers are alike, and asking is what takes time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

FRESH = -1
"""Place of an output that shares its storage with no input."""

BY_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)


class OpCache:
    """Calls an operation once for each kind of arguments, and from then on makes what it gave.

    A kind is the operation, shapes, strides and types of its tensors, and its other arguments. What depends on values,
    or has tensors that hold one number (whose type gives way to others'), is asked anew.

    Args:
        fake: the mode of the tensors without values.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        self.fake = fake
        self.cpu = torch.device("cpu")
        self._known: dict[Any, tuple[type, list[Any]] | None] = {}

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the operation gives for these arguments, of which some have no values."""
        inputs: list[Tensor] = []
        try:
            key = (func, _kind(args, inputs), _kind(tuple(kwargs.items()), inputs))
            asked = key in self._known
        except TypeError:  # an argument that cannot be looked up
            return func(*args, **kwargs)
        found = self._known.get(key)
        if found is not None:
            kind, recipe = found
            made = [self._made(one, inputs) for one in recipe]
            return made[0] if kind is Tensor else kind(made)
        out = func(*args, **kwargs)
        if not asked:
            self._known[key] = None if self._by_values(func, inputs) else self._recipe(out, inputs)
        return out

    def _by_values(self, func: Any, inputs: Sequence[Tensor]) -> bool:
        return any(tag in func.tags for tag in BY_VALUES) or any(not tensor.ndim for tensor in inputs)

    def _recipe(self, out: Any, inputs: Sequence[Tensor]) -> tuple[type, list[Any]] | None:
        """How to make the outputs again; None: by asking torch."""
        kind = type(out) if type(out) in (tuple, list) else Tensor
        storages = [tensor.untyped_storage()._cdata for tensor in inputs]
        recipe: list[Any] = []
        for one in (out,) if kind is Tensor else out:
            if isinstance(one, Tensor):
                place = next((i for i, tensor in enumerate(inputs) if tensor is one), None)
                recipe.append((place,) if place is not None else self._shape(one, inputs, storages))
                if recipe[-1] is None:
                    return None
                storages.append(-1 if place is not None else one.untyped_storage()._cdata)
            else:
                recipe.append(one)
        return kind, recipe

    def _shape(self, one: Tensor, inputs: Sequence[Tensor], storages: list[int]) -> tuple[Any, ...] | None:
        """An output by its shape and the input whose storage it shares."""
        if not self._is_empty(one) or one.device != self.cpu or not one.ndim:
            return None
        place = storages.index(own) if (own := one.untyped_storage()._cdata) in storages else FRESH
        if place == FRESH:
            whole = not one.storage_offset() and one.untyped_storage().nbytes() == _bytes(one)
            return (FRESH, one.size(), one.stride(), one.dtype, 0) if whole else None
        same = place < len(inputs) and self._is_empty(inputs[place]) and inputs[place].dtype == one.dtype
        return (place, one.size(), one.stride(), one.dtype, one.storage_offset()) if same else None

    def _is_empty(self, tensor: Tensor) -> bool:
        return getattr(tensor, "fake_mode", None) is self.fake

    def _made(self, one: Any, inputs: Sequence[Tensor]) -> Any:
        if not isinstance(one, tuple):
            return one
        if len(one) == 1:
            return inputs[one[0]]
        place, size, stride, dtype, offset = one
        if place == FRESH:
            element = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        else:
            with in_kernel_invocation_manager(self.fake):
                element = torch.as_strided(inputs[place], size, stride, offset)
        return FakeTensor(self.fake, element, self.cpu)


def _bytes(tensor: Tensor) -> int:
    """Of a storage that ends with the tensor's last number."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _kind(value: Any, inputs: list[Tensor]) -> Any:
    """What of arguments decides on what an operation gives, to be looked up by; collects the tensors among them."""
    if isinstance(value, Tensor):
        inputs.append(value)
        return (value.size(), value.stride(), value.dtype, value.storage_offset(), isinstance(value, FakeTensor))
    if isinstance(value, list | tuple):
        return tuple(_kind(one, inputs) for one in value)
    return type(value), value
