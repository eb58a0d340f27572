"""A stage's loss and its gradients as one graph of ATen operations, which two engines are written from.

Rules: the batch is the only open size, so whatever follows may compute with all others. Four gradients
stay whole (`KEPT`), for each engine has a better form of them than torch's decomposition. Operations are
in the order of autograd: the forward pass, then the gradients from the loss down.

Next: `export/onnx_step.py` and `export/executorch.py`, which add AdamW and write the files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from export.stage import Cut, example
from wire.errors import UserError

aten = torch.ops.aten
KEPT = (
    aten.gelu_backward.default,
    aten.native_layer_norm_backward.default,
    aten.embedding_dense_backward.default,
    aten._softmax_backward_data.default,
)
_TRACE_BATCH = 19  # no other size is likely to be the same

_traced: dict[bytes, fx.GraphModule] = {}


def loss_and_gradients(cut: Cut, structure: bytes, *, of_inputs: bool = False) -> fx.GraphModule:
    """(parameters..., inputs...) -> (loss float32 [], gradients...), in `cut`'s order of both.

    of_inputs: the gradients of the inputs come first; then those of the parameters, each as one row
    [B, ...] an example, which add up to it.
    Every node's `meta["val"]` tells its shape. structure: equal for cuts that differ in the values of their
    parameters only. Each is traced once in a process, for that takes seconds, so the graph is to be read,
    not changed. Raises `UserError` for a model whose operations depend on the size of the batch.
    """
    if structure not in _traced:
        _traced[structure] = _trace(cut, of_inputs=of_inputs)
    return _traced[structure]


def _trace(cut: Cut, *, of_inputs: bool) -> fx.GraphModule:
    names = [name for name, _ in cut.named_parameters()]

    def loss(parameters: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        with FlatLinear():
            result: Tensor = torch.func.functional_call(cut, parameters, inputs)
        return result

    def of_parameters(*values: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, values, strict=False))
        gradients, value = torch.func.grad_and_value(loss)(parameters, values[len(names) :])
        return (value, *(gradients[name] for name in names))

    def of_both(*values: Tensor) -> tuple[Tensor, ...]:
        parameters, inputs = dict(zip(names, values, strict=False)), values[len(names) :]
        both, value = torch.func.grad_and_value(loss, argnums=(0, 1))(parameters, inputs)
        examples = inputs[0].shape[0]
        rows = [(both[0][name] / examples).expand(examples, *both[0][name].shape) for name in names]
        return (value, *both[1], *rows)

    graph = traced(cut, of_both if of_inputs else of_parameters)
    sizes = [node.meta["val"].shape[0] for node in _placeholders(graph)[len(names) :]]
    if any(not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None for size in sizes):
        raise UserError(
            "the model computes otherwise for other numbers of examples", "use operations that do not"
        )
    graph.graph.eliminate_dead_code()
    return graph


def traced(cut: Cut, compute: Callable[..., Any], *, inputs_first: bool = False) -> fx.GraphModule:
    """The operations of `compute` on `cut`'s parameters and a batch of its inputs, or the other way."""
    limits = dict.fromkeys(cut.inputs, 1)
    inputs = example(cut.inputs, _TRACE_BATCH, limits, torch.Generator().manual_seed(0))
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    parameters = [_stand_in(mode, value.detach(), open_batch=False) for value in cut.parameters()]
    batch = [_stand_in(mode, value, open_batch=True) for value in inputs.values()]
    values = [*batch, *parameters] if inputs_first else [*parameters, *batch]
    with mode:
        return make_fx(compute, decomposition_table=_decompositions())(*values)


def is_open(size: Any) -> bool:
    """Whether a size depends on the batch."""
    return not isinstance(size, int)


def _placeholders(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _stand_in(mode: FakeTensorMode, value: Tensor, *, open_batch: bool) -> Tensor:
    """A stand-in of the same shape, all of it fixed but, perhaps, the first size."""
    kinds = [DimDynamic.STATIC] * value.dim()
    if open_batch:
        kinds[0] = DimDynamic.DUCK  # one symbol for all inputs
    return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Torch's own, of everything that is not core ATen, but for `KEPT`."""
    table: Any = torch.export.default_decompositions()
    table = dict(table.items())
    return {operation: how for operation, how in table.items() if operation not in KEPT}


class FlatLinear(TorchFunctionMode):
    """`linear` on rows: torch's own takes the batch's size for a constant when it flattens inside grad."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is not linear:
            return function(*args, **(kwargs or {}))
        value, weight = args[:2]
        bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
        rows = value.reshape(-1, weight.shape[1])
        result = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        return result.reshape(-1, *value.shape[1:-1], weight.shape[0])
