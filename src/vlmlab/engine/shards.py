"""FSDP2: the towers' weights, their gradients and optimizer states cut into shards, one of each on every rank.

Every transformer layer of a tower is a unit whose whole weights exist only while it computes, and so is every block
that a fusion has put at a port of the LM's layers, also while its method ``memory`` makes what positions read of the
images; what is outside the layers (embeddings, last norm, head) is one more, the root's, which is whole from the
forward to the backward pass. Connector, what else a fusion has, pair head, objectives and adapters stay whole on every
rank: they are small, and whether a micro-batch reaches them may depend on its data, so that ranks would not agree on
what to exchange. Their gradients travel as without shards (``vlmlab.engine.stage``).

What is saved, proved and compared is always whole: ``whole`` and ``gathered`` are called by all ranks together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from vlmlab.engine.layers import tower_layers
from vlmlab.lm.inside import blocks
from vlmlab.recipe.stage import LAYERED

FSDP2 = "fsdp2"
"""The strategy by which ranks share weights; ours, by Lightning's ``ModelParallelStrategy``."""

BASE = ".base"


def shard(model: Any, mesh: DeviceMesh, half: bool) -> None:
    """Cut the weights of the towers, and of a fusion's blocks in them, in place.

    Args:
        model: a ``VLM`` or ``DualEncoder``; its weights become ``DTensor`` s.
        mesh: the ranks, one-dimensional.
        half: compute with bfloat16 weights; gradients are summed in float32.
    """
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # autocast does that, as without shards
    if half:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": set(replicated(model))}
    for unit in units(model):
        fully_shard(unit, **options)
        if hasattr(unit, "memory"):  # a block's, which the fusion calls besides its forward
            register_fsdp_forward_method(unit, "memory")
    fully_shard(model, **options)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):  # the losses are divided by counts over all ranks: gradients are summed
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)


def units(model: Any) -> list[nn.Module]:
    """What is whole only while it computes: the towers' layers, and the blocks that a fusion has put into them."""
    return [*tower_layers(model), *fusion_blocks(model)]


def fusion_blocks(model: Any) -> list[nn.Module]:
    """The blocks at the ports of the LM's layers whose weights are the fusion's."""
    fusion, lm = getattr(model, "fusion", None), getattr(getattr(model, "lm", None), "model", None)
    if fusion is None or lm is None:
        return []
    own = set(fusion.modules())
    return [block for block in blocks(lm) if block in own]


def replicated(model: Any) -> Iterator[nn.Parameter]:
    """Every weight that is neither a tower's own nor of a fusion's block: of other parts, and of adapters."""
    cut = {id(parameter) for block in fusion_blocks(model) for parameter in block.parameters()}
    parts: dict[str, list[tuple[str, nn.Parameter]]] = model.parts()
    for part, named in parts.items():
        if part.removesuffix(BASE) not in LAYERED or part + BASE in parts:
            yield from (parameter for _, parameter in named if id(parameter) not in cut)


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is one of several shards."""
    return isinstance(tensor, DTensor)


def assembled(tensor: Tensor) -> Tensor:
    """The tensor of which this is a shard, on its device; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this is a shard, on the CPU; any other as it is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """The rows that a rank has of a shard, which writing to them changes; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_like(shard: Tensor, tensor: Tensor) -> Tensor:
    """Of a whole tensor the rows that this rank has of a shard; as it is where that has another shape or is none."""
    if not isinstance(shard, DTensor) or shard.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor.to(shard.device), shard.device_mesh, shard.placements, src_data_rank=None)


def gathered(tree: Any, keep: bool = True) -> Any:
    """Nested containers with whole tensors in place of shards; without `keep` (one rank writes) they are dropped."""

    def gather(leaf: Any) -> Any:
        full = whole(leaf) if isinstance(leaf, Tensor) else leaf
        return full if keep or not isinstance(leaf, DTensor) else None

    return tree_map(gather, tree)


def scattered(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state dict of whole tensors, cut as the optimizer's parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def cut(index: int, value: Any) -> Any:
        return cut_like(parameters[index], value) if isinstance(value, Tensor) else value

    cuts = {i: {key: cut(i, value) for key, value in values.items()} for i, values in state["state"].items()}
    return {**state, "state": cuts}


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, the shards of all ranks included."""
    gradients = list(gradients)
    norm = get_total_norm([g for g in gradients if not isinstance(g, DTensor)])
    if shards := [own(g) for g in gradients if isinstance(g, DTensor)]:
        square = get_total_norm(shards).square()
        dist.all_reduce(square)
        norm = (norm.square() + square).sqrt()
    return norm


def clip(parameters: Iterable[nn.Parameter], largest: float, norm: Tensor) -> None:
    """Scale gradients, whole ones and shards, so that their norm is at most `largest`."""
    parameters = list(parameters)
    clip_grads_with_norm_([p for p in parameters if not isinstance(p, DTensor)], largest, norm)
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if isinstance(parameter, DTensor) and parameter.grad is not None:
            own(parameter.grad).mul_(factor)
