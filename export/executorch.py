"""The `executorch` engine's programs: a stage's AdamW step, its loss, and the graphs that only infer.

Rules: a program holds no weight, everything comes in by position. `train` takes the parameters, `exp_avg`
and `exp_avg_sq` of each, `step` (float32 [], 1 in the first), `learning_rate` (float32 []) and the batch;
it gives the loss and the new values, in the same order. An update is one operation that stands after the
last use of its parameter, so all three may be written in place. `evaluate` takes the parameters and the
batch;
`infer`, of a program for inference, its data and then its parameters. The batch may have any size up to
the bound given here. Equal structure gives equal bytes.

Of ExecuTorch's pipeline only the end is used, from planning the memory on: what comes before re-traces the
graph a dozen times, which takes a minute for a block of each modality.

Next: `export/executorch_graph.py`, which rewrites the graph; `edge_client/engines/executorch.py`, which
runs the program.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils._sympy.value_ranges import ValueRanges

from export.executorch_graph import recompute, simplify, write, write_over
from export.executorch_memory import plan
from export.executorch_ops import lamina
from export.stage import Cut, TrainCut
from export.step import FlatLinear, aten, is_open, traced
from wire.manifest import AdamW

TRAIN, EVALUATE, INFER = "train", "evaluate", "infer"


def train_program(cut: TrainCut, graph: fx.GraphModule, optimizer: AdamW, max_batch_size: int) -> bytes:
    """Methods `train` and `evaluate`. graph: what `export.step.loss_and_gradients` has made of `cut`."""
    count = len(list(cut.parameters()))
    step = copy.deepcopy(graph.graph)
    simplify(step)
    evaluation = copy.deepcopy(step)
    loss = _output(evaluation).args[0][0]
    _output(evaluation).args = ((loss,),)
    evaluation.eliminate_dead_code()
    recompute(step)
    _add_updates(step, count, optimizer)
    return _program({TRAIN: step, EVALUATE: evaluation}, max_batch_size)


def inference_program(cut: Cut, max_batch_size: int) -> bytes:
    """Method `infer`: inputs in `cut`'s order, then its parameters -> its outputs."""
    names = [name for name, _ in cut.named_parameters()]

    def compute(*values: Tensor) -> tuple[Tensor, ...]:
        count = len(cut.inputs)
        with FlatLinear():
            result = torch.func.functional_call(
                cut, dict(zip(names, values[count:], strict=True)), values[:count]
            )
        return (result,)

    with torch.no_grad():
        graph = traced(cut, compute, inputs_first=True).graph
    simplify(graph)
    return _program({INFER: graph}, max_batch_size)


def _output(graph: fx.Graph) -> Any:
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def _add_updates(graph: fx.Graph, count: int, settings: AdamW) -> None:
    """The optimizer's inputs and outputs, and each parameter's update as soon as nothing else reads it."""
    places = [node for node in graph.nodes if node.op == "placeholder"]
    parameters, batch = places[:count], places[count:]
    with graph.inserting_before(batch[0]):
        moments = [
            [_placeholder(graph, f"{kind}_{i}", node.meta["val"]) for i, node in enumerate(parameters)]
            for kind in ("exp_avg", "exp_avg_sq")
        ]
        mode = batch[0].meta["val"].fake_mode
        scalars = [
            _placeholder(graph, name, mode.from_tensor(torch.ones(())))
            for name in ("step", "learning_rate")
        ]
    output = _output(graph)
    loss, *gradients = output.args[0]
    order = {node: place for place, node in enumerate(graph.nodes)}
    new: list[list[fx.Node]] = [[], [], []]
    for parameter, average, square, gradient in zip(parameters, *moments, gradients, strict=True):
        last = max([gradient, *_readers(parameter)], key=order.__getitem__)
        with graph.inserting_after(last):
            anchor = graph.call_function(operator.add, (0, 0))  # a place to insert before
        with graph.inserting_before(anchor):
            update = write(
                graph,
                lamina.adamw.default,
                *(parameter, average, square, gradient, *scalars),
                *(settings.beta1, settings.beta2, settings.eps, settings.weight_decay),
            )
            for place, values in enumerate(new):
                values.append(write(graph, operator.getitem, update, place))
        graph.erase_node(anchor)
    output.args = ((loss, *new[0], *new[1], *new[2]),)


def _placeholder(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def _readers(node: fx.Node) -> list[fx.Node]:
    """Everything that reads a value, by itself or through a view."""
    found = []
    for user in node.users:
        found.append(user)
        if user.target is aten.view_copy.default:
            found += _readers(user)
    return found


def _program(methods: dict[str, fx.Graph], max_batch_size: int) -> bytes:
    with _silence():
        from executorch.exir import EdgeCompileConfig, EdgeProgramManager, ExecutorchBackendConfig, memory
        from executorch.exir.memory_planning import MemoryPlanningAlgorithmSuite
        from executorch.exir.passes import MemoryPlanningPass, ToOutVarPass

        class ToOutForm(ToOutVarPass):  # type: ignore[misc]
            def call(self, graph_module: fx.GraphModule) -> Any:
                result = super().call(graph_module)
                write_over(result.graph_module.graph, memory.view)
                return result

        config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
        edges = {name: _exported(graph, max_batch_size) for name, graph in methods.items()}
        planning = MemoryPlanningPass(
            MemoryPlanningAlgorithmSuite([plan]), alloc_graph_input=False, alloc_graph_output=False
        )
        manager = EdgeProgramManager(edges, compile_config=config).to_executorch(
            ExecutorchBackendConfig(memory_planning_pass=planning, to_out_var_pass=ToOutForm())
        )
        content: bytes = bytes(manager.buffer)
    return content


def _exported(graph: fx.Graph, max_batch_size: int) -> ExportedProgram:
    """The graph as `torch.export` would have made it, which would trace it twice more."""
    inputs = []
    _bound(graph, max_batch_size)
    for node in graph.nodes:
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
        if node.op == "placeholder":
            inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None))
    outputs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None)
        for node in _output(graph).args[0]
    ]
    root = fx.GraphModule(torch.nn.Module(), graph)
    return ExportedProgram(
        root=root,
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={},
        range_constraints={},
        module_call_graph=[],
        example_inputs=None,
        constants={},
    )


def _bound(graph: fx.Graph, max_batch_size: int) -> None:
    """Say how large the one open size may be. A graph may be traced once and written for several bounds."""
    for node in graph.nodes:
        for size in node.meta["val"].shape if node.op == "placeholder" else ():
            if is_open(size):
                ranges = size.node.shape_env.var_to_range
                ranges[size.node.expr] = ValueRanges(1, max_batch_size)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """ExecuTorch's modules warn of torch's age and their own, and log what they could not load."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
