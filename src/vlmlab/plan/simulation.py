"""One optimizer step's micro-batch without a weight: its FLOPs and its memory, by doing it with tensors without values.

A model of the meta device goes forward and backward with tensors that have shapes only (torch's ``FakeTensorMode``),
under the precision, freezing, adapter, mask, objective and checkpointing of its stage. Two things are noted:

- FLOPs: torch's own formulas (``torch.utils.flop_counter.flop_registry``), and ours where it has none or another: 2 per
  multiply-add of every matrix product, convolution and attention, nothing for all else. An attention counts the whole
  S x S square, masked or not, and 5 products backward, since fused kernels compute the scores again. What frozen parts
  save and what checkpointing computes twice is counted as it happens.
- Bytes: every storage from the operation that makes it until it is freed, as an allocator sees it. The peak above
  weights, gradients and optimizer state is called activations: what is kept for the backward pass, 16-bit copies of
  the weights, logits, and the largest temporary tensors.

The device is a CPU as far as operations can see: with fused attention and autocast it keeps what a GPU keeps.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.tensors import Batch
from vlmlab.engine.cost import FLOPS
from vlmlab.engine.weights import StagedModel
from vlmlab.plan.op_cache import OpCache

aten = torch.ops.aten

LARGE = 1 << 16
"""Elements from which on a float tensor computed from real ones loses its values: nothing decides on those."""


@dataclass(frozen=True)
class Pass:
    """One micro-batch forward and backward.

    Attributes:
        forward, total: FLOPs of the forward pass, and of both.
        peak: most bytes at once, without weights, their gradients and the optimizer's state.
    """

    forward: int
    total: int
    peak: int


class Simulator:
    """Sends micro-batches through a model of the meta device as a stage trains it.

    Args:
        staged: the model with the stage entered.
        half: bfloat16 autocast.
        op_cache: what operations give, of other passes; None: nothing yet.
    """

    def __init__(self, staged: StagedModel, half: bool, op_cache: OpCache | None = None) -> None:
        self.staged, self.half = staged, half
        self.op_cache = op_cache or OpCache(FakeTensorMode(allow_non_fake_inputs=True))

    def __call__(self, batch: Batch) -> Pass:
        """Forward and backward of one micro-batch, gradients of earlier ones being there.

        Raises:
            UserError: the composition decides on the values of its features, which a plan does not have.
        """
        model = self.staged.model
        fake, trained = self.op_cache.fake, self.staged.trained().values()
        with shapes_only(model, fake, trained) as known, Meter(fake, known, self.op_cache) as meter:
            with value_errors(), torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                loss = self._loss(model, batch)
                forward = meter.flops
                with torch.autocast("cpu", enabled=False):
                    loss.backward()  # type: ignore[no-untyped-call]
            del loss
            return Pass(forward, meter.flops, meter.peak)

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs = model(batch)
        total: Any = 0.0
        for objective in self.staged.objectives.values():
            for value, _ in objective(outputs, batch).values():
                total = total + objective.weight * value / float(batch.supervised or 1)
        return total


@contextlib.contextmanager
def value_errors() -> Iterator[None]:
    """While this is open, a decision on values that tensors of shapes alone do not have is one sentence.

    Raises:
        UserError: in that case.
    """
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(
            f"this composition decides on the values of its features ({error.func}), which a plan does not "
            "have; plan another one, or train it with budget=test and read its cost.json."
        ) from error


@contextlib.contextmanager
def shapes_only(model: nn.Module, fake: FakeTensorMode, trained: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The model's weights and buffers as CPU tensors without values while this is open; yields them.

    Those of `trained` have a gradient, as after an earlier micro-batch.
    """
    wanted = {id(p) for p in trained}
    before: list[tuple[dict[str, Any], str, Any]] = []
    for module in model.modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for table in tables:
            before += [(table, name, tensor) for name, tensor in table.items() if tensor is not None]
    every = {id(tensor): tensor for _, _, tensor in before}
    made = {key: _flag() for key, tensor in every.items() if _is_flag(tensor)}
    with fake:  # once, since entering it looks for devices
        made |= {key: _empty(tensor) for key, tensor in every.items() if key not in made}
        for key in wanted & made.keys():
            made[key].grad = _empty(every[key].detach())
    for table, name, tensor in before:
        table[name] = made[id(tensor)]
    try:
        yield [t for new in made.values() for t in (new, new.grad) if t is not None]
    finally:
        for table, name, tensor in before:
            table[name] = tensor


def _is_flag(tensor: Tensor) -> bool:
    """Whether a buffer says that a module has done what it does but once."""
    return tensor.dtype == torch.bool and not tensor.ndim


def _flag() -> Tensor:
    """Set, since what is done once is not part of a micro-batch."""
    return torch.ones((), dtype=torch.bool, device="cpu")


def _empty(tensor: Tensor) -> Tensor:
    """The same shape and type, on the CPU as far as operations can see; without values inside a `FakeTensorMode`."""
    new = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


class Meter(TorchDispatchMode):
    """Counts FLOPs and live bytes of everything that runs inside.

    Layouts keep their values, so that what is chosen by them has its true size; all that is computed from weights has
    none.

    Args:
        fake: the mode of the tensors without values.
        known: tensors that are there already and are not counted.
        op_cache: what operations in this mode give, of other passes; None: nothing yet.

    Attributes:
        flops: so far.
        peak: most live bytes so far.
    """

    def __init__(self, fake: FakeTensorMode, known: Sequence[Tensor], op_cache: OpCache | None = None) -> None:
        super().__init__()
        self.fake = fake
        self._op_cache = op_cache or OpCache(fake)
        self.flops = self.live = self.peak = 0
        self._seen: Any = WeakIdKeyDictionary()
        self._watched: dict[int, Any] = {}
        for tensor in known:
            self._seen[tensor.untyped_storage()] = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # their marks live as long as they do

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, Tensor) and self._is_empty(leaf) for leaf in _flat(args, kwargs)):
            args = _by_number(func, args)
            if func is aten.masked_select.default and not self._is_empty(args[1]):
                out = args[0].new_empty(int(torch.broadcast_to(args[1], args[0].shape).sum()))
                return self._watch(out)
            out = self._op_cache(func, args, kwargs)
        else:
            out = tree_map(self._without_values, func(*args, **kwargs))
        formula = FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return self._watch(out)

    def _is_empty(self, tensor: Tensor) -> bool:
        return getattr(tensor, "fake_mode", None) is not None

    def _without_values(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() > LARGE and not self._is_empty(leaf):
            with self.fake:
                return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="cpu")
        return leaf

    def _watch(self, out: Any) -> Any:
        """Count every new storage from now until it is freed."""
        for leaf in out if isinstance(out, list | tuple) else (out,):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage in self._seen:
                continue
            size = storage.nbytes()
            self._seen[storage] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            key = id(storage)
            self._watched[key] = weakref.ref(storage, partial(self._freed, key, size))
        return out

    def _freed(self, key: int, size: int, _: Any) -> None:
        self.live -= size
        self._watched.pop(key, None)


def _flat(args: Any, kwargs: Any) -> Iterator[Any]:
    """The arguments of an operation, those in lists one by one."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def _by_number(func: Any, args: Any) -> Any:
    """Boolean indices with values as numbers: the size of what they choose is then known."""
    indexed = func._schema.name.partition("::")[2].lstrip("_").startswith("index")
    if indexed and len(args) > 1 and isinstance(args[1], list):
        chosen: list[Any] = []
        for index in args[1]:
            real = isinstance(index, Tensor) and getattr(index, "fake_mode", None) is None
            chosen += list(index.nonzero(as_tuple=True)) if real and index.dtype == torch.bool else [index]
        return (args[0], chosen, *args[2:])
    return args
