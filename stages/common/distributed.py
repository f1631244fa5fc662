"""Training in several processes, with the results of one process."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Choice = TypeVar("Choice")


def several_processes() -> bool:
    """Return whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average_over_processes(value: Tensor) -> Tensor:
    """Average a tensor over processes, without a gradient."""
    if not several_processes():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def agree(choice: Choice) -> Choice:
    """Return the first process's choice in all processes."""
    if not several_processes():
        return choice
    chosen: list[Any] = [choice]
    dist.broadcast_object_list(chosen)
    return chosen[0]


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, in their order."""
    if not several_processes():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_equal(value: Any) -> bool:
    """Return whether all processes have the same value."""
    return all(other == value for other in gather(value))


def draw_noise(
    rng: torch.Generator, ratio: int, batch: int, z_dim: int, device: torch.device
) -> Tensor:
    """Draw (k*B, z_dim) from N(0, I), k draws a mask, row j*B + i for draw j of mask i.

    ``rng`` is the same in all processes. Each draws the noise of the whole batch and takes its own
    rows, so that the noise of a mask does not depend on the number of processes.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if several_processes() else (1, 0)
    noise = torch.randn(ratio, ranks * batch, z_dim, generator=rng, device=device)
    return noise[:, rank * batch : (rank + 1) * batch].flatten(0, 1)


# -- networks in several processes ---------------------------------------------------------------


def replicate(network: nn.Module, device: torch.device) -> nn.Module:
    """Copy a network to every process and average gradients (DDP); buffers are equal already."""
    name = (
        "forward_sync_buffers"
        if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
        else "broadcast_buffers"
    )
    options: dict[str, Any] = {
        name: False,
        "device_ids": [device] if device.type == "cuda" else None,
    }
    return DistributedDataParallel(network, **options)


def shard(network: nn.Module, device: torch.device) -> nn.Module:
    """Divide a network's weights over the processes (FSDP), in place, block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        fully_shard,  # a second to import, which only those pay who divide
    )

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = list(network.children())
    for block in (
        blocks if len(blocks) > 1 else []
    ):  # a single one is a network in a wrapper that may not call its forward
        if not isinstance(block, nn.ModuleList) and any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    return fully_shard(network, mesh=mesh)  # type: ignore[return-value]


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Return whether several processes hold parts of a tensor."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def full_state(state: Any) -> Any:
    """Collect the sharded tensors of a state dict from all processes, which must all call it."""
    if is_sharded(state):
        return state.full_tensor()
    if isinstance(state, dict):
        return type(state)((key, full_state(value)) for key, value in state.items())
    return state


def shard_like(state: dict[str, Any], divided: Mapping[str, Any]) -> dict[str, Any]:
    """Shard the full tensors of a state dict like the tensors of the same names."""
    from torch.distributed.tensor import distribute_tensor

    return {
        name: distribute_tensor(value, like.device_mesh, like.placements)
        if is_sharded(like := divided.get(name))
        else value
        for name, value in state.items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a full state into an optimizer, sharded and laid out like its parameters.

    Fused optimizers ignore strides: a contiguous moment of a channels-last weight would be added
    to other elements of it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    divided = {
        number: shard_like(
            values,
            dict.fromkeys(
                (name for name, value in values.items() if value.ndim), parameters[number]
            ),
        )
        for number, values in state["state"].items()
    }
    for number, values in divided.items():
        for name, value in values.items():
            if value.shape == parameters[number].shape and not is_sharded(value):
                values[name] = torch.empty_like(
                    parameters[number], dtype=value.dtype, device=value.device
                ).copy_(value)
    optimizer.load_state_dict({**state, "state": divided})


# -- batch normalisation -------------------------------------------------------------------------


class _Sum(torch.autograd.Function):
    """Sum a tensor over processes, and its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """Normalise with the statistics of all processes' batches; PyTorch's own needs a GPU.

    All processes must have the same number of samples.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, h, w)."""
        if not self.training or not several_processes():
            return super().forward(input)
        x = input.float()
        moments = torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])  # (2, C)
        mean, square = _Sum.apply(moments) / dist.get_world_size()
        variance = (square - mean.square()).clamp(min=0)
        if self.track_running_stats:
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            count = dist.get_world_size() * input.numel() / input.shape[1]
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = (variance + self.eps).rsqrt()
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return (x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(input.dtype)


def synchronise_batch_norm(network: nn.Module) -> nn.Module:
    """Replace every batch normalisation by a synchronised one, in place; weights and names stay.

    Those with frozen weights are left alone: they belong to a backbone in evaluation mode.
    """
    for name, child in network.named_children():
        if type(child) is nn.BatchNorm2d and not (child.affine and not child.weight.requires_grad):
            replacement = SynchronisedBatchNorm2d(
                child.num_features,
                child.eps,
                child.momentum,
                child.affine,
                child.track_running_stats,
            )
            replacement.load_state_dict(child.state_dict())
            replacement.to(next(iter(child.state_dict().values())).device).train(child.training)
            setattr(network, name, replacement)
        else:
            synchronise_batch_norm(child)
    return network
