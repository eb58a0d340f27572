"""What a part of the model costs, counted without computing anything: torch runs it on its meta device.

Rules: FLOPs are torch's count, 2 for a multiply-add of matrix products, convolutions and attention; norms,
activations and the optimizer are left out, they come to a few in a hundred. The backward pass is the real
one, so a gradient that nobody needs is not counted. Memory is the most that inputs, activations and
temporaries hold at once; parameters are left out, and a gradient counts until it is complete, when an
engine would use it up.

Next: `export/costs.py`, which adds up a schedule.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from export.stage import Cut
from models.model import Model
from models.registry import build

META = "meta"


@dataclass(frozen=True)
class Observed:
    """flops: of the whole batch. peak_bytes: parameters apart."""

    flops: int
    peak_bytes: int


def skeleton(builder: str, options: dict[str, Any]) -> Model:
    """The model without its values. Raises `UserError` as `models.registry.build` does."""
    with torch.device(META):
        return build(builder, **options)


def observe_step(cut: Cut, batch_size: int) -> Observed:
    """Loss and gradients of a `TrainCut` of a `skeleton`."""
    handles = [
        parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in cut.parameters()
    ]
    try:
        return _observe(lambda: cut(*_inputs(cut, batch_size)).backward())
    finally:
        for handle in handles:
            handle.remove()


def observe_forward(cut: Cut, batch_size: int) -> Observed:
    """Outputs alone."""
    with torch.no_grad():
        return _observe(lambda: cut(*_inputs(cut, batch_size)))


def _observe(work: Callable[[], Any]) -> Observed:
    with torch.device(META), _Live() as live, FlopCounterMode(display=False) as flops:
        work()
    return Observed(flops.get_total_flops(), live.peak)


def _inputs(cut: Cut, batch_size: int) -> list[Tensor]:
    return [
        torch.empty((batch_size, *spec.shape), dtype=getattr(torch, spec.dtype))
        for spec in cut.inputs.values()
    ]


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it, each storage once, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        self.peak = max(self.peak, self._now)
        return result

    def _add(self, storage: Any) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            size = storage.nbytes()
            self._now += size
            weakref.finalize(storage, self._let_go, size)

    def _let_go(self, size: int) -> None:
        self._now -= size
