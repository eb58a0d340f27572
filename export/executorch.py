"""The `executorch` engine's programs: a stage's AdamW step, its loss, and the graphs that only infer.

Rules: a program holds no weight, everything comes in by position. `train` takes the parameters, `exp_avg`
and `exp_avg_sq` of each, `step` (float32 [], 1 in the first), `learning_rate` (float32 []) and the batch;
it gives the loss and the new values, in the same order. An update is one operation that stands after the
last use of its parameter, so all three may be written in place. `evaluate` takes the parameters and the
batch;
`infer`, of a program for inference, its data and then its parameters. The batch may have any size up to
the bound given here. Equal structure gives equal bytes.

A step in micro-batches (`export/passes.py`) has other methods. All take the parameters first; `gradients`,
then sums that it adds to, and gives the loss and the sums, `update` the rest of what `train` takes and the
sums in place of the batch. `embed` and `pairs` are of a contrastive loss, `evaluate` of the other.

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
from export.passes import Passes
from export.stage import Cut, TrainCut
from export.step import FlatLinear, aten, is_open, traced
from wire.manifest import AdamW

TRAIN, EVALUATE, INFER = "train", "evaluate", "infer"
EMBED, PAIRS, GRADIENTS, UPDATE = "embed", "pairs", "gradients", "update"


def train_program(cut: TrainCut, graph: fx.GraphModule, optimizer: AdamW, max_batch_size: int) -> bytes:
    """Methods `train` and `evaluate`. graph: what `export.step.loss_and_gradients` has made of `cut`."""
    count = len(list(cut.parameters()))
    step = copy.deepcopy(graph.graph)
    simplify(step)
    evaluation = _loss_only(step)
    recompute(step)
    _add_updates(step, count, optimizer)
    return _program({TRAIN: (step, max_batch_size), EVALUATE: (evaluation, max_batch_size)})


def passes_program(
    passes: Passes,
    gradients: fx.GraphModule,
    pairs: fx.GraphModule | None,
    optimizer: AdamW,
    max_batch_size: int,
) -> bytes:
    """The methods of a step in micro-batches. gradients, pairs: what `loss_and_gradients` has made."""
    names = [name for name, _ in passes.gradients.named_parameters()]
    step = copy.deepcopy(gradients.graph)
    simplify(step)
    parameters = _placeholders(step)[: len(names)]
    methods = {GRADIENTS: (step, passes.size), UPDATE: (_update(parameters, optimizer), 1)}
    if passes.embed is None or passes.pairs is None or pairs is None:
        methods[EVALUATE] = (_loss_only(step), passes.size)
    else:
        embed = _inference(passes.embed, inputs_first=False)
        matching = copy.deepcopy(pairs.graph)
        simplify(matching)
        for cut, graph in ((passes.embed, embed), (passes.pairs, matching)):
            _add_unused(graph, [name for name, _ in cut.named_parameters()], names, parameters)
        methods |= {EMBED: (embed, passes.size), PAIRS: (matching, max_batch_size)}
    recompute(step)
    _add_sums(step, len(names))
    return _program(methods)


def inference_program(cut: Cut, max_batch_size: int) -> bytes:
    """Method `infer`: inputs in `cut`'s order, then its parameters -> its outputs."""
    return _program({INFER: (_inference(cut), max_batch_size)})


def _inference(cut: Cut, *, inputs_first: bool = True) -> fx.Graph:
    names = [name for name, _ in cut.named_parameters()]

    def compute(*values: Tensor) -> tuple[Tensor, ...]:
        count = len(cut.inputs) if inputs_first else len(names)
        first, last = values[:count], values[count:]
        parameters, inputs = (last, first) if inputs_first else (first, last)
        with FlatLinear():
            result = torch.func.functional_call(cut, dict(zip(names, parameters, strict=True)), inputs)
        return result if isinstance(result, tuple) else (result,)

    with torch.no_grad():
        graph = traced(cut, compute, inputs_first=inputs_first).graph
    simplify(graph)
    return graph


def _output(graph: fx.Graph) -> Any:
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def _loss_only(graph: fx.Graph) -> fx.Graph:
    """A copy without gradients."""
    evaluation = copy.deepcopy(graph)
    loss = _output(evaluation).args[0][0]
    _output(evaluation).args = ((loss,),)
    evaluation.eliminate_dead_code()
    return evaluation


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _add_unused(graph: fx.Graph, own: list[str], names: list[str], parameters: list[fx.Node]) -> None:
    """Let a graph that begins with the parameters `own` begin with all, so all methods are fed alike."""
    places = iter(_placeholders(graph))
    place = next(places)
    for name, parameter in zip(names, parameters, strict=True):
        if name in own:
            place = next(places)
        else:
            with graph.inserting_before(place):
                _placeholder(graph, f"unused_{parameter.name}", parameter.meta["val"])


def _add_sums(graph: fx.Graph, count: int) -> None:
    """Sums of gradients come in after the parameters, and go out with the gradients added to them."""
    output = _output(graph)
    loss, *gradients = output.args[0]
    with graph.inserting_before(_placeholders(graph)[count]):
        sums = [_placeholder(graph, f"sum_{i}", node.meta["val"]) for i, node in enumerate(gradients)]
    added = []
    for total, gradient in zip(sums, gradients, strict=True):
        with graph.inserting_before(gradient.next):
            added.append(write(graph, aten.add.Tensor, total, gradient))
    output.args = ((loss, *added),)


def _update(parameters: list[fx.Node], settings: AdamW) -> fx.Graph:
    """The optimizer alone: its gradients, the sums, come last."""
    graph = fx.Graph()
    own, sums = (
        [_placeholder(graph, f"{kind}_{node.name}", node.meta["val"]) for node in parameters]
        for kind in ("new", "sum")
    )
    moments, scalars = _optimizer_inputs(graph, own, sums[0])
    new: list[list[fx.Node]] = [[], [], []]
    for values in zip(own, *moments, sums, strict=True):
        _append_update(graph, new, values, scalars, settings)
    graph.output((*new[0], *new[1], *new[2]))
    return graph


def _add_updates(graph: fx.Graph, count: int, settings: AdamW) -> None:
    """The optimizer's inputs and outputs, and each parameter's update as soon as nothing else reads it."""
    places = _placeholders(graph)
    parameters = places[:count]
    moments, scalars = _optimizer_inputs(graph, parameters, places[count])
    output = _output(graph)
    loss, *gradients = output.args[0]
    order = {node: place for place, node in enumerate(graph.nodes)}
    new: list[list[fx.Node]] = [[], [], []]
    for values in zip(parameters, *moments, gradients, strict=True):
        last = max([values[-1], *_readers(values[0])], key=order.__getitem__)
        with graph.inserting_after(last):
            anchor = graph.call_function(operator.add, (0, 0))  # a place to insert before
        with graph.inserting_before(anchor):
            _append_update(graph, new, values, scalars, settings)
        graph.erase_node(anchor)
    output.args = ((loss, *new[0], *new[1], *new[2]),)


def _optimizer_inputs(
    graph: fx.Graph, parameters: list[fx.Node], following: fx.Node
) -> tuple[list[list[fx.Node]], list[fx.Node]]:
    """`exp_avg` and `exp_avg_sq` of all, then `step` and `learning_rate`, before the input `following`."""
    mode = following.meta["val"].fake_mode
    with graph.inserting_before(following):
        moments = [
            [_placeholder(graph, f"{kind}_{i}", node.meta["val"]) for i, node in enumerate(parameters)]
            for kind in ("exp_avg", "exp_avg_sq")
        ]
        scalars = [
            _placeholder(graph, name, mode.from_tensor(torch.ones(())))
            for name in ("step", "learning_rate")
        ]
    return moments, scalars


def _append_update(
    graph: fx.Graph,
    new: list[list[fx.Node]],
    values: tuple[fx.Node, ...],
    scalars: list[fx.Node],
    settings: AdamW,
) -> None:
    """values: a parameter, its moments and its gradient; what becomes of the first three goes to `new`."""
    numbers = (settings.beta1, settings.beta2, settings.eps, settings.weight_decay)
    update = write(graph, lamina.adamw.default, *values, *scalars, *numbers)
    for place, one in enumerate(new):
        one.append(write(graph, operator.getitem, update, place))


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


def _program(methods: dict[str, tuple[fx.Graph, int]]) -> bytes:
    """methods: name -> graph and its largest batch."""
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
        edges = {name: _exported(graph, most) for name, (graph, most) in methods.items()}
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
