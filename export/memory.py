"""The memory a client's process is expected to need for a stage: its high-water mark of resident memory.

Rules: a process that trains comes to

    base of the engine + copies of the trained parameters + share of what torch would hold for the step

with three numbers an engine, fitted to measured peaks (`lamina/rehearsal.py`, of tiny and vit-tiny at
batches of 8 to 32, layer-wise and end-to-end): off by 8% at most there, and up to 14% too high where steps
are in micro-batches. The copies are the offered values, the engine's two sets, the moments, the trained
values and the update, and with them the graph's own size. An engine that recomputes holds less than torch,
an arena that grows in pieces more. In micro-batches the rest of the batch waits, and ExecuTorch holds the
gradients' sums besides, where the others have such a copy already. Before the steps the prefix's newest
segment runs, with parameters and memory of its own. Besides, a client has the broker's connection and
messages.

Next: `export/observe.py`, what torch would hold; `export/budget.py`, which decides by this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

CLIENT_BYTES = (
    22_000_000  # the broker's connection, messages, an update as it is packed, what rounds leave behind
)
SEGMENT_SHARE = 0.85  # of what the forward pass of a segment holds, to that of a step


@dataclass(frozen=True)
class Footprint:
    """What decides over a stage's memory, in bytes.

    step: examples at once -> the most that the step's inputs, activations and temporaries hold.
    example_bytes: of its inputs. anchor_bytes: of what makes the anchors, beside the step.
    segment_parameter_bytes, segment_bytes: of the segments that run before it, if any.
    """

    parameter_bytes: int
    step: Callable[[int], int]
    example_bytes: int = 0
    anchor_bytes: int = 0
    segment_parameter_bytes: int = 0
    segment_bytes: int = 0


@dataclass(frozen=True)
class EngineMemory:
    """base_bytes: with a client's imports and the runtime, idle. sums: copies more in micro-batches."""

    base_bytes: int
    copies: float
    share: float
    sums: float = 0.0


ENGINES = {
    "onnx": EngineMemory(74_000_000, 8.4, 1.35),
    "executorch": EngineMemory(54_000_000, 5.9, 0.84, sums=1.0),
    "ort-training": EngineMemory(91_000_000, 7.5, 1.23),
}


def peak_bytes(engine: str, footprint: Footprint, batch_size: int, micro_batch_size: int = 0) -> int:
    """Expected of a whole client. micro_batch_size: 0 for none."""
    memory = ENGINES[engine]
    copies = memory.copies + (memory.sums if micro_batch_size else 0.0)
    at_once = min(micro_batch_size or batch_size, batch_size)
    waiting = (batch_size - at_once) * footprint.example_bytes
    beside = waiting + footprint.anchor_bytes
    training = copies * footprint.parameter_bytes + memory.share * footprint.step(at_once) + beside
    segment = footprint.segment_parameter_bytes + SEGMENT_SHARE * memory.share * footprint.segment_bytes
    return CLIENT_BYTES + memory.base_bytes + round(max(training, segment))
