"""The passes of the `onnx` engine's train step in micro-batches, as graphs of standard operators.

Rules: for each parameter `p` of the stage, the graph of gradients reads `p` and `p.gradient_sum` and gives
`p.gradient_sum.next`, the sum with the gradient of a micro-batch added; besides, `loss`. The update reads
`p`, `p.gradient_sum` and the rest as the plain step does, and gives what that gives. In both, all that is
given may be written over what it is made from: one operator reads it, before the one that writes. `pairs`
takes the parameters of the loss and the embeddings, and gives the loss and what `gradients` is given.

Next: `edge_client/engines/onnx.py`, which runs them in turn; `export/onnx_step.py`, the plain step.
"""

from __future__ import annotations

from onnx import ModelProto
from torch import fx

from export.aten_onnx import Writer
from export.onnx_step import (
    LEARNING_RATE,
    STEP,
    SUMS,
    Update,
    batches,
    model_of,
    shapes_of,
    used_up,
    value,
    values,
    write_operations,
)
from export.passes import GradientsCut, PairsCut
from wire.manifest import AdamW, TensorSpec

_SUM = ".gradient_sum"


def gradients(cut: GradientsCut, graph: fx.GraphModule) -> ModelProto:
    """graph: what `export.step.loss_and_gradients` has made of `cut`."""
    shapes = shapes_of(cut)
    writer = Writer(batch=next(iter(cut.inputs)))
    loss, *found = write_operations(writer, cut, graph)
    writer.write("Identity", loss, to="loss")

    def add(name: str, gradient: fx.Node) -> None:
        writer.write("Add", f"{name}{_SUM}", gradient, to=f"{name}{_SUM}.next")

    used_up(writer, dict(zip(shapes, found, strict=True)), add)
    given = [*values(shapes, "", _SUM), *batches(cut.inputs)]
    return model_of(writer, given, [value("loss", ()), *values(shapes, f"{_SUM}.next")])


def update(cut: GradientsCut, optimizer: AdamW) -> ModelProto:
    """AdamW, from the sums of the gradients."""
    shapes = shapes_of(cut)
    writer = Writer(batch="")
    adamw = Update(writer, optimizer)
    for name in shapes:
        adamw.update(name, f"{name}{_SUM}")
    moments = [f".{kind}" for kind in SUMS]
    given = [*values(shapes, "", _SUM, *moments), value(STEP, ()), value(LEARNING_RATE, ())]
    return model_of(writer, given, values(shapes, ".next", *(f"{one}.next" for one in moments)))


def pairs(cut: PairsCut, given: dict[str, TensorSpec], graph: fx.GraphModule) -> ModelProto:
    """graph: as of `gradients`, `of_inputs`. given: that of the `GradientsCut`."""
    writer = Writer(batch=next(iter(cut.inputs)))
    results = write_operations(writer, cut, graph)
    for name, result in zip(("loss", *given), results, strict=True):
        writer.write("Identity", result, to=name)
    inputs = [*values(shapes_of(cut), ""), *batches(cut.inputs)]
    return model_of(writer, inputs, [value("loss", ()), *batches(given)])
