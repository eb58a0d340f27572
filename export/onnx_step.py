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

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import fx

from export.aten_onnx import Writer, write_operation
from export.graph import BATCH, OPSET, PRODUCER, normalise
from export.stage import TrainCut
from wire.manifest import AdamW, TensorSpec

STEP, LEARNING_RATE = "step", "learning_rate"
SUMS = ("exp_sum", "exp_sum_sq")
_KINDS = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def train_step(cut: TrainCut, graph: fx.GraphModule, optimizer: AdamW) -> ModelProto:
    """graph: what `export.step.loss_and_gradients` has made of `cut`. Raises `UserError`."""
    shapes = {name: tuple(value.shape) for name, value in cut.named_parameters()}
    names = iter([*shapes, *cut.inputs])
    writer = Writer(batch=next(iter(cut.inputs)))
    nodes = list(graph.graph.nodes)
    gradients: dict[fx.Node, list[str]] = {}
    for name, node in zip(shapes, _results(nodes)[1:], strict=True):
        gradients.setdefault(node, []).append(name)
    adamw = _AdamW(writer, optimizer)
    for node in nodes:
        if node.op == "placeholder":
            writer.names[node] = next(names)
        elif node.op == "get_attr":  # a buffer of the model
            writer.names[node] = writer.constant(getattr(graph, str(node.target)).numpy())
        elif node.op == "call_function":
            write_operation(writer, node)
    writer.nodes.append(helper.make_node("Identity", [writer.name(_results(nodes)[0])], ["loss"]))
    updates = [adamw.update(name, node) for node in nodes for name in gradients.get(node, ())]
    writer.nodes += [node for update in reversed(updates) for node in update]
    return _model(writer, cut.inputs, shapes)


def _results(nodes: Sequence[fx.Node]) -> Sequence[Any]:
    """The loss, then the gradients."""
    results: Any = nodes[-1].args[0]
    return tuple(results)


class _AdamW:
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

    def update(self, name: str, gradient: fx.Node) -> list[NodeProto]:
        """The nodes of the new value and sums of the parameter `name`."""
        writer, settings = self._writer, self._settings
        write, before = writer.write, len(writer.nodes)
        first, second = (f"{name}.{kind}" for kind in SUMS)
        total = write("Add", write("Mul", first, settings.beta1), gradient, to=f"{first}.next")
        square = write("Mul", gradient, gradient)
        total_sq = write("Add", write("Mul", second, settings.beta2), square, to=f"{second}.next")
        share = write("Div", total, write("Add", write("Sqrt", total_sq), self._floor))
        decayed = write("Mul", name, self._decay)
        write("Sub", decayed, write("Mul", share, self._scale), to=f"{name}.next")
        nodes = writer.nodes[before:]
        del writer.nodes[before:]
        return nodes


def _model(writer: Writer, inputs: dict[str, TensorSpec], shapes: dict[str, tuple[int, ...]]) -> ModelProto:
    def value(name: str, shape: tuple[Any, ...], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    given = [
        value(f"{name}{suffix}", shape)
        for suffix in ("", *(f".{kind}" for kind in SUMS))
        for name, shape in shapes.items()
    ]
    given += [value(STEP, ()), value(LEARNING_RATE, ())]
    given += [value(name, (BATCH, *spec.shape), _KINDS[spec.dtype]) for name, spec in inputs.items()]
    made = [value("loss", ())]
    made += [
        value(f"{name}{suffix}.next", shape)
        for suffix in ("", *(f".{kind}" for kind in SUMS))
        for name, shape in shapes.items()
    ]
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
