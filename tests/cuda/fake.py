"""CUDA without a GPU: tensors that have a device, a type and a shape, but no values.

PyTorch's ``FakeTensorMode`` refuses what mixes devices, and what needs values of a tensor on the
GPU: there the CPU would wait for it. The two modes here add what it does not see: copies that the
CPU waits for, and random numbers from a generator of another device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from featurestore import StoreSpec
from featurestore.dataset import Batch

CUDA = torch.device("cuda", 0)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class CudaGenerator(torch.Generator):
    """A generator that says it is on the GPU; it is never drawn from."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA


def new_generator(device: torch.device | str = "cpu") -> torch.Generator:
    return CudaGenerator() if torch.device(device).type == "cuda" else GENERATOR(device)


GENERATOR = torch.Generator


class RefuseWaits(TorchDispatchMode):
    """Refuses copies between CPU and GPU that the CPU waits for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if function in COPIES:
            source = args[-1] if function is COPIES[1] else args[0]
            target = args[0].device if function is COPIES[1] else kwargs.get("device")
            target = source.device if target is None else torch.device(target)
            waits = not kwargs.get("non_blocking") and (function is COPIES[0] or not args[2:])
            if source.device.type != target.type and waits:
                raise AssertionError(f"the CPU waits for a copy to {target} of {source.shape}")
        return function(*args, **kwargs)


class CheckGenerators(TorchFunctionMode):
    """Refuses random numbers of one device from a generator of another."""

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and isinstance(result, Tensor):
            assert generator.device.type == result.device.type, (
                f"{function} draws for {result.device} from a generator on {generator.device}"
            )
        return result


def to_cuda(value: Any, mode: FakeTensorMode, memo: dict[int, Any]) -> Any:
    """Move all tensors that an object of ours holds to the fake GPU, in place where it can be."""
    if id(value) in memo:
        return memo[id(value)][0]
    moved = value
    if isinstance(value, Tensor):
        with mode, torch.no_grad():
            moved = torch.empty_like(mode.from_tensor(value.detach()), device=CUDA)
        if isinstance(value, nn.Parameter):
            moved = nn.Parameter(moved, value.requires_grad)
    memo[id(value)] = moved, value  # the value is kept, so that its id stays its own
    if isinstance(value, nn.Module):
        for module in value.modules():
            for held in (module._parameters, module._buffers, module.__dict__):
                for name, each in list(held.items()):
                    if not name.startswith("_forward") and not isinstance(each, nn.Module):
                        held[name] = to_cuda(each, mode, memo)
    elif isinstance(value, torch.optim.Optimizer):
        for group in value.param_groups:
            group["params"] = [to_cuda(each, mode, memo) for each in group["params"]]
        value.state.clear()  # a step makes it again
    elif isinstance(value, dict) and type(value) is dict:
        for name, each in list(value.items()):
            value[name] = to_cuda(each, mode, memo)
    elif isinstance(value, list | tuple) and type(value) in (list, tuple):
        moved = type(value)(to_cuda(each, mode, memo) for each in value)
        if isinstance(value, list):
            value[:] = moved
            moved = value
        memo[id(value)] = moved, value
    elif isinstance(value, functools.partial):
        to_cuda(value.keywords, mode, memo)
    elif type(value).__module__.startswith("stages.") and hasattr(value, "__dict__"):
        for name, each in list(vars(value).items()):
            object.__setattr__(value, name, to_cuda(each, mode, memo))
    return moved


def fake_batch(spec: StoreSpec, positions: list[int], more: list[int]) -> Batch:
    """Make a batch of a store, with extra samples at the positions ``more``."""
    size = len(positions) + len(more)
    images = torch.empty(size, *spec.mask_shape, 3, dtype=torch.uint8, device=CUDA)
    samples = Batch(
        torch.tensor(positions + more),
        torch.empty(size, *spec.feature_shape, device=CUDA),
        torch.empty(size, *spec.mask_shape, dtype=torch.uint8, device=CUDA),
        images.permute(0, 3, 1, 2),  # (B, H, W, 3) -> (B, 3, H, W)
    )
    batch = samples[: len(positions)]
    batch.extra = samples[len(positions) :] if more else None
    return batch


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Compute on the fake GPU within the block: nothing in it may wait for values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with monkeypatch.context() as patch, ExitStack() as stack:
        patch.setattr(torch, "Generator", new_generator)
        patch.setattr(Tensor, "pin_memory", lambda self: self)
        patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        patch.setattr(Accelerator, "device", property(lambda _: CUDA))
        for each in (mode, RefuseWaits(), CheckGenerators()):
            stack.enter_context(each)
        yield mode
