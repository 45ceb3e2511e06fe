"""A device of its own without a GPU: its numbers are in memory, but no operation takes them together with the host's.

It goes by the name "meta", which torch knows on every machine. What a GPU would refuse is refused here: tensors of two
devices in one operation (numbers without dimensions excepted, and copies), and ``numpy()`` of what is not on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
COPIES = ("_to_copy", "copy_", "set_")
ASK = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_consecutive", "equal")
"""Operations whose answer the host has to wait for on a GPU: a number, or a shape that follows from values."""
waits: list[str] = []
"""What the host has waited for; whoever counts clears it."""


class Apart(torch.Tensor):
    """A tensor that is said to be on the device; ``held`` are its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Apart:
        made: Apart = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.Tensor.tolist:
                waits.append("tolist")
                return args[0].held.tolist()
            if function is torch.Tensor.numpy:
                raise TypeError("a tensor of the device is not the host's memory")
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the host with what the device holds."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Apart)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Apart) and tensor.dim()]
    name = operation.__name__.split(".")[0]
    if there and here and name not in COPIES:
        shapes = [(type(tensor).__name__, tuple(tensor.shape)) for tensor in tensors]
        raise RuntimeError(f"{operation}: tensors of two devices: {shapes}")
    if there and _waits(name, args, kwargs):
        waits.append(name)
    said = kwargs.get("device")
    goes_there = bool(there) if said is None else torch.device(said) == DEVICE
    if name in ("copy_", "set_"):
        goes_there = isinstance(args[0], Apart)
    if said is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, Apart) else leaf, (args, kwargs))
    out = operation(*plain_args, **plain_kwargs)
    same = {id(tensor.held): tensor for tensor in there}

    def back(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not goes_there:
            return leaf
        known = same.get(id(leaf))
        return Apart(leaf) if known is None else known

    return tree_map(back, out)


def _waits(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Say whether a GPU would be waited for."""
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name == "_to_copy":
        return torch.device(kwargs.get("device") or DEVICE) != DEVICE
    if name == "copy_":
        return not isinstance(args[0], Apart)
    return name in ASK


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


class _Words(TorchFunctionMode):
    """Lets tensors that are made of Python's numbers go to the device with them, which torch leaves out for "meta"."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if function is torch.Tensor.new_tensor:
            like, numbers = args
            return torch.tensor(numbers, dtype=like.dtype).to(like.device)
        return function(*args, **kwargs)


@contextmanager
def device_apart() -> Iterator[torch.device]:
    """Let there be the device; yield it."""
    without_gradients = mock.patch.object(torch._C, "_InferenceMode", lambda mode: torch.set_grad_enabled(not mode))
    with _Mode(), _Words(), without_gradients:  # wrapped tensors have no versions, which inference tensors lack
        yield DEVICE


def host(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor's numbers."""
    return value.held if isinstance(value, Apart) else value
