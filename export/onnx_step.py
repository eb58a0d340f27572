"""The `onnx` engine's train step: forward, gradients and AdamW as one graph of standard operators.

Rules: for a parameter `p` of the cut the graph has the inputs `p`, `p.exp_sum` and `p.exp_sum_sq`, and the
outputs `p.next`, `p.exp_sum.next` and `p.exp_sum_sq.next`. The sums are Adam's moments, which torch calls
`exp_avg` and `exp_avg_sq`, over 1 - beta; both begin with zeros. Besides, `step` (float32 [], 1 in the
first step), `learning_rate` (float32 []) and the stage's inputs come in, and `loss` (float32 [], before the
step) goes out. AdamW is torch.optim.AdamW (Loshchilov and Hutter, arXiv 1711.05101).

The order of the nodes is a matter of memory. ONNX Runtime goes to the graph's outputs from the last node to
the first, each time depth first to what is still missing. So the updates stand at the end, the one whose
gradient comes first as the last: gradients are used up one after the other, and what the forward pass has
kept for them goes with them.

Next: `export/aten_onnx.py`, the operators; `edge_client/engines/onnx.py`, which runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import fx

from export.aten_onnx import Writer, write_operation
from export.graph import BATCH, OPSET, PRODUCER, normalise
from export.stage import Cut, TrainCut
from wire.manifest import AdamW, TensorSpec

STEP, LEARNING_RATE = "step", "learning_rate"
SUMS = ("exp_sum", "exp_sum_sq")
_KINDS = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def train_step(cut: TrainCut, graph: fx.GraphModule, optimizer: AdamW) -> ModelProto:
    """graph: what `export.step.loss_and_gradients` has made of `cut`. Raises `UserError`."""
    shapes = shapes_of(cut)
    writer = Writer(batch=next(iter(cut.inputs)))
    adamw = Update(writer, optimizer)
    loss, *gradients = write_operations(writer, cut, graph)
    writer.write("Identity", loss, to="loss")
    used_up(writer, dict(zip(shapes, gradients, strict=True)), adamw.update)
    moments = values(shapes, *(f".{kind}" for kind in SUMS))
    made = values(shapes, ".next", *(f".{kind}.next" for kind in SUMS))
    given = [*values(shapes, ""), *moments, value(STEP, ()), value(LEARNING_RATE, ())]
    return model_of(writer, [*given, *batches(cut.inputs)], [value("loss", ()), *made])


def write_operations(writer: Writer, cut: Cut, graph: fx.GraphModule) -> tuple[fx.Node, ...]:
    """Write all of `graph`, what `loss_and_gradients` has made of `cut`; its results."""
    names = iter([*shapes_of(cut), *cut.inputs])
    results: Any = ()
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            writer.names[node] = next(names)
        elif node.op == "get_attr":  # a buffer of the model
            writer.names[node] = writer.constant(getattr(graph, str(node.target)).numpy())
        elif node.op == "call_function":
            write_operation(writer, node)
        else:
            results = node.args[0]
    return tuple(results)


def used_up(writer: Writer, gradients: dict[str, fx.Node], use: Callable[[str, fx.Node], object]) -> None:
    """Write what `use` does with each gradient, given by its parameter, last the one that comes first."""
    order = {node: place for place, node in enumerate(writer.names)}
    for name in sorted(gradients, key=lambda name: -order[gradients[name]]):
        use(name, gradients[name])


class Update:
    """Writes the update of one parameter after the other, in eleven operators.

    Adam's averages are (1 - beta) times the sums kept here. So with m = (1 - beta1) M, v = (1 - beta2) V,
    c = 1 - beta^step, its rate * (m / c1) / (sqrt(v / c2) + eps) is scale * M / (sqrt(V) + floor), with
    floor = eps * sqrt(c2 / (1 - beta2)) and scale = rate * (1 - beta1) / c1 * sqrt(c2 / (1 - beta2)).
    """

    def __init__(self, writer: Writer, settings: AdamW) -> None:
        self._writer = writer
        self._settings = settings
        write = writer.write

        def number(value: float) -> str:
            return writer.constant(np.float64(value))

        # In float64: near beta = 1, float32 would lose half of the digits of 1 - beta^step.
        step, rate = (writer.cast(name, TensorProto.DOUBLE) for name in (STEP, LEARNING_RATE))
        left = [
            write("Div", write("Sub", number(1), write("Pow", number(beta), step)), number(1 - beta))
            for beta in (settings.beta1, settings.beta2)
        ]
        root = write("Sqrt", left[1])
        self._floor = writer.cast(write("Mul", root, number(settings.eps)), TensorProto.FLOAT)
        self._scale = writer.cast(write("Div", write("Mul", rate, root), left[0]), TensorProto.FLOAT)
        decay = write("Sub", number(1), write("Mul", rate, number(settings.weight_decay)))
        self._decay = writer.cast(decay, TensorProto.FLOAT)

    def update(self, name: str, gradient: fx.Node | str) -> None:
        """Write the new value and sums of the parameter `name`."""
        write, settings = self._writer.write, self._settings
        first, second = (f"{name}.{kind}" for kind in SUMS)
        total = write("Add", write("Mul", first, settings.beta1), gradient, to=f"{first}.next")
        square = write("Mul", gradient, gradient)
        total_sq = write("Add", write("Mul", second, settings.beta2), square, to=f"{second}.next")
        share = write("Div", total, write("Add", write("Sqrt", total_sq), self._floor))
        decayed = write("Mul", name, self._decay)
        write("Sub", decayed, write("Mul", share, self._scale), to=f"{name}.next")


def shapes_of(cut: Cut) -> dict[str, tuple[int, ...]]:
    """Local parameter name -> shape."""
    return {name: tuple(parameter.shape) for name, parameter in cut.named_parameters()}


def value(name: str, shape: tuple[Any, ...], kind: int = TensorProto.FLOAT) -> Any:
    """What a graph says of an input or output."""
    return helper.make_tensor_value_info(name, kind, shape)


def values(shapes: dict[str, tuple[int, ...]], *endings: str) -> list[Any]:
    """For each ending one float32 value a parameter."""
    return [value(f"{name}{ending}", shape) for ending in endings for name, shape in shapes.items()]


def batches(inputs: dict[str, TensorSpec]) -> list[Any]:
    """Values of an open first size."""
    return [value(name, (BATCH, *spec.shape), _KINDS[spec.dtype]) for name, spec in inputs.items()]


def model_of(writer: Writer, given: list[Any], made: list[Any]) -> ModelProto:
    """The graph from `given` to `made`, of what has been written as far as it is needed."""
    nodes = _needed(writer.nodes, {one.name for one in made})
    used = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in writer.constants.values() if tensor.name in used]
    graph = helper.make_graph(nodes, PRODUCER, given, made, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    normalise(model)
    return model


def _needed(nodes: list[NodeProto], outputs: set[str]) -> list[NodeProto]:
    """The nodes that some output depends on, in their order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]
