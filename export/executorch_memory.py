"""Where a program's values lie while it runs.

Rules: memory is planned for the largest batch, and a smaller one is to use its share of it only. So values
lie in bins, all from a bin's beginning on: a batch of half the size touches half of every bin. Offsets
chosen freely pack a full batch an eighth tighter, but one of an eighth of that size a quarter looser.
A value takes the smallest bin that is free while it lives, large values first. Equal graphs have
equal plans.

Next: `edge_client/engines/executorch_shim.h`, `Pages`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_ARENA = 1  # ExecuTorch's number of the only memory


@dataclass
class _Bin:
    size: int
    values: list[Any] = field(default_factory=list)

    def is_free_for(self, value: Any) -> bool:
        return all(
            value.lifetime[1] < one.lifetime[0] or one.lifetime[1] < value.lifetime[0]
            for one in self.values
        )


def plan(alignment: int, specs: Iterable[Any], *_: Any, **__: Any) -> Any:
    """A planning algorithm as `MemoryPlanningAlgorithmSuite` takes it."""
    from executorch.exir.memory_planning import MemoryAlgoResult, SpecAllocResult

    values: dict[int, Any] = {}
    for spec in specs:  # a view is planned with what it is a view of
        spec.realign(alignment)
        base = spec
        while hasattr(base, "_base"):
            base = base._base
        values.setdefault(id(base), base)
    bins: list[_Bin] = []
    ordered = sorted(
        values.values(),
        key=lambda one: (-one.allocated_memory, one.lifetime[0] - one.lifetime[1], one.lifetime[0]),
    )
    for value in ordered:
        value.realign(alignment)
        free = [one for one in bins if one.is_free_for(value)]
        if not free:
            free = [_Bin(value.allocated_memory)]
            bins += free
        min(free, key=lambda one: one.size).values.append(value)
    placed: dict[Any, Any] = {}
    offset = 0
    for number, one in enumerate(bins):
        placed |= {value: SpecAllocResult(_ARENA, number, offset) for value in one.values}
        offset += one.size
    return MemoryAlgoResult(placed, [0, offset])
