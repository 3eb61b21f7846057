"""CUDA graphs for a CPU: the operations of a call, recorded, and run again on the same memory.

What Python decided during the recording stays decided, as in a CUDA graph: a length, a page or a
token that the host put into the step would be frozen in every replay. What no graph can hold is
refused when it is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Their outputs' values or shapes come from data, so the host waits; or they draw random numbers.
WAITING = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
)
INDEXING = ("aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")


class Unsafe(AssertionError):
    """An operation that cannot be captured."""


class HostCalls(TorchFunctionMode):
    """Refuses functions that turn tensors into Python values or the other way: some of them never
    reach the dispatcher."""

    REFUSED = frozenset(
        {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}
        | {Tensor.tolist, Tensor.numpy, Tensor.item, Tensor.cpu, Tensor.__bool__, Tensor.__int__}
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.REFUSED:
            raise Unsafe(f"{func.__name__} needs the host")
        return func(*args, **(kwargs or {}))


class GraphSafe(TorchDispatchMode):
    """Refuses operations that wait for the device, upload from the host, or draw numbers; keeps
    every other one in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):  # so that what is inside it shows
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self.refuse(func, args, kwargs)
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    @staticmethod
    def refuse(func, args, kwargs) -> None:
        name = func.name()
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in INDEXING or name.startswith("aten::index_put"):
            masks = [x for x in tree_leaves(args[1]) if x is not None and x.dtype == torch.bool]
            if masks:
                raise Unsafe(f"{name} with a mask")
        elif any(tag in func.tags for tag in WAITING):
            raise Unsafe(name)
        if name == "aten::lift_fresh":
            raise Unsafe("a tensor made of Python values")
        devices = {x.device.type for x in tensors if x.dim() or name == "aten::copy_"}
        target = kwargs.get("device")
        if target is not None and tensors:
            devices.add(torch.device(target).type)
        if len(devices) > 1:
            raise Unsafe(f"{name} from {' to '.join(sorted(devices))}")


@contextmanager
def recording() -> Iterator[GraphSafe]:
    """The operations of a step are refused or recorded here."""
    with HostCalls(), GraphSafe() as operations:
        yield operations


class RecordedGraphs:
    """What `glm4.decoder.CudaGraphs` is on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.captures = self.replays = 0

    def capture(self, call):
        self.captures += 1
        with Undone(), recording() as recorded:
            call()

        def replay() -> None:
            self.replays += 1
            for func, args, kwargs, out in recorded.calls:
                fresh = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(fresh), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay


class Undone(TorchDispatchMode):
    """Puts back what was written in it: capturing a CUDA graph runs nothing."""

    def __enter__(self):
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for whole, before in self.before.values():
            whole.copy_(before)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        given |= kwargs or {}
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                if given.get(argument.name) is None:
                    continue
                storage = given[argument.name].untyped_storage()
                if storage.data_ptr() not in self.before:
                    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self.before[storage.data_ptr()] = whole, whole.clone()
        return func(*args, **(kwargs or {}))
