"""ATen operations as standard ONNX operators: the table from which `export/onnx_step.py` writes a graph.

Rules: opset 17. An operation is one entry of `FORMS`: a function of the writer and the operation's
arguments that returns the name (or names) of its result. What only renames a value writes nothing; a
transposed matrix becomes a flag of `Gemm`; equal constants are one initializer. Constants keep their value:
no pass over this graph drops an epsilon.

Next: `export/onnx_step.py`. The operators: https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, fx

from export.step import aten, is_open
from wire.errors import UserError

Form = Callable[..., Any]
_END = 2**62  # as the end of a slice: all of it


class Writer:
    """Collects nodes and constants. batch: name of an input whose first size is the batch's."""

    def __init__(self, batch: str) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[tuple[str, tuple[int, ...], bytes], TensorProto] = {}
        self.names: dict[fx.Node, Any] = {}
        self._batch = batch
        self._count = 0
        self._sizes: dict[tuple[int, ...], str] = {}

    def write(self, op: str, *inputs: Any, outputs: int = 1, to: str = "", **attributes: Any) -> Any:
        """Add a node. inputs: names, fx nodes or numbers (float32). The name of its output, or names.

        to: the output's name, for one that is seen from outside.
        """
        self._count += 1
        names = [to or f"v{self._count}" + (f".{i}" if outputs > 1 else "") for i in range(outputs)]
        inputs = tuple(map(self.name, inputs))
        self.nodes.append(helper.make_node(op, inputs, names, name=names[0], **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def cast(self, value: Any, kind: int) -> str:
        """The name of a value as another type, a number of `TensorProto`."""
        self._count += 1
        name = f"v{self._count}"
        self.nodes.append(helper.make_node("Cast", [self.name(value)], [name], name=name, to=kind))
        return name

    def name(self, value: Any) -> str:
        """The name of an argument: a value's, or a constant's."""
        if isinstance(value, fx.Node):
            found: str = self.names[value]
            return found
        return value if isinstance(value, str) else self.constant(np.float32(value))

    def constant(self, value: Any) -> str:
        """The name of an initializer of this numpy value."""
        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(array, f"c{len(self.constants)}")
        return self.constants[key].name

    def integers(self, values: Sequence[int]) -> str:
        """The name of an int64 vector."""
        return self.constant(np.array(values, np.int64))

    def shape(self, sizes: Sequence[Any]) -> str:
        """The name of a shape as an int64 vector, computed where more than one size is open."""
        open_sizes = [size for size in sizes if is_open(size)]
        if len(open_sizes) < 2:
            return self.integers([-1 if is_open(size) else size for size in sizes])
        return self.exact_shape(sizes)

    def exact_shape(self, sizes: Sequence[Any]) -> str:
        """As `shape`, without -1 for an open size."""
        if not any(map(is_open, sizes)):
            return self.integers(list(sizes))
        parts = [self.size(size) if is_open(size) else self.integers([size]) for size in sizes]
        return parts[0] if len(parts) == 1 else str(self.write("Concat", *parts, axis=0))

    def size(self, size: Any) -> str:
        """The name of an open size as an int64 vector of one: a number times a power of the batch."""
        expression = size.node.expr
        (symbol,) = expression.free_symbols
        factor = int(expression.subs(symbol, 1))
        power = round(math.log2(int(expression.subs(symbol, 2)) / factor)) if factor > 0 else 0
        if expression != factor * symbol**power:
            raise UserError(f"a size of {expression} for {symbol} examples", "use sizes that grow evenly")
        if (factor, power) not in self._sizes:
            name = self.write("Shape", self._batch, start=0, end=1)
            for _ in range(power - 1):
                name = self.write("Mul", name, self._sizes.get((1, 1), name))
            if factor != 1:
                name = self.write("Mul", name, self.integers([factor]))
            self._sizes[(factor, power)] = name
        return self._sizes[(factor, power)]


def write_operation(writer: Writer, node: fx.Node) -> None:
    """Write one call of the graph. Raises `UserError` for an operation that has no form here."""
    value = node.meta["val"]
    if isinstance(value, torch.SymInt):
        return  # sizes are written where a shape needs them
    if node.target is operator.getitem:
        writer.names[node] = writer.names[node.args[0]][node.args[1]]  # type: ignore[index]
        return
    form = FORMS.get(node.target)
    if form is None or _varied(node):
        raise UserError(
            f"the model computes {node.target}{_varied(node)}, which has no ONNX form here",
            "add it to FORMS in export/aten_onnx.py, or export for other engines (--engine)",
        )
    writer.names[node] = form(writer, node, *node.args)


def _varied(node: fx.Node) -> str:
    """Keyword arguments that change what an operation computes, such as the kind of a GELU."""
    usual: dict[str, Any] = {"alpha": 1, "approximate": "none", "rounding_mode": None}
    found = [
        f"{name}={node.kwargs[name]}" for name in usual if node.kwargs.get(name, usual[name]) != usual[name]
    ]
    return f" with {', '.join(found)}" if found else ""


def sizes(node: fx.Node) -> tuple[Any, ...]:
    """A value's shape: an int, or an open size, for each axis."""
    return tuple(size if isinstance(size, int) else _fixed(size) for size in node.meta["val"].shape)


def _fixed(size: torch.SymInt) -> Any:
    known = size.node.maybe_as_int()
    return size if known is None else known


def _same_shape(node: fx.Node, other: Any) -> bool:
    return isinstance(other, fx.Node) and [str(s) for s in sizes(node)] == [str(s) for s in sizes(other)]


# --- values renamed, moved and cut ---------------------------------------------------------------


def _alias(writer: Writer, _node: fx.Node, value: fx.Node, *_: Any) -> str:
    return writer.name(value)


def _reshape(writer: Writer, node: fx.Node, value: fx.Node, *_: Any) -> str:
    if _same_shape(node, value):
        return writer.name(value)
    return str(writer.write("Reshape", value, writer.shape(sizes(node))))


def _expand(writer: Writer, node: fx.Node, value: fx.Node, *_: Any) -> str:
    if _same_shape(node, value):
        return writer.name(value)
    return str(writer.write("Expand", value, writer.exact_shape(sizes(node))))


def _permutation(node: Any) -> tuple[Any, list[int]]:
    """What a chain of permutations begins with, and all of them as one."""
    order = list(range(node.meta["val"].dim()))
    while node.target in (aten.permute.default, aten.clone.default):
        if node.target is aten.permute.default:
            step = [axis % len(order) for axis in node.args[1]]
            order = [step[axis] for axis in order]
        node = node.args[0]
    return node, order


def _permute(writer: Writer, node: fx.Node, *_: Any) -> str:
    value, order = _permutation(node)
    if order == sorted(order):
        return writer.name(value)
    return str(writer.write("Transpose", value, perm=order))


def _slice(
    writer: Writer,
    node: fx.Node,
    value: fx.Node,
    axis: int = 0,
    start: Any = 0,
    end: Any = None,
    step: int = 1,
) -> str:
    if _same_shape(node, value):
        return writer.name(value)
    first, last = _bounds(start, end)
    limits = [writer.integers([one]) for one in (first, last, axis, step)]
    return str(writer.write("Slice", value, *limits))


def _bounds(start: Any, end: Any) -> tuple[int, int]:
    """Where a cut begins and ends, as numbers."""
    if is_open(start or 0) or is_open(end or 0):
        raise UserError("the model cuts a tensor by the number of examples", "cut along other axes only")
    return start or 0, _END if end is None else min(end, _END)


def _slice_scatter(
    writer: Writer,
    _node: fx.Node,
    value: fx.Node,
    part: fx.Node,
    axis: int = 0,
    start: Any = 0,
    end: Any = None,
    step: int = 1,
) -> str:
    if step != 1:
        raise UserError("the model cuts a tensor with a step", "take all of it, and drop what is too much")
    along, (first, last) = writer.integers([axis]), _bounds(start, end)
    before = writer.write("Slice", value, writer.integers([0]), writer.integers([first]), along)
    after = writer.write("Slice", value, writer.integers([last]), writer.integers([_END]), along)
    return str(writer.write("Concat", before, part, after, axis=axis))


def _select_scatter(
    writer: Writer, node: fx.Node, value: fx.Node, part: fx.Node, axis: int, index: int
) -> str:
    row = writer.write("Unsqueeze", part, writer.integers([axis]))
    first = index % sizes(value)[axis]
    return _slice_scatter(writer, node, value, row, axis, first, first + 1)


def _select(writer: Writer, _node: fx.Node, value: fx.Node, axis: int, index: int) -> str:
    return str(writer.write("Gather", value, writer.constant(np.int64(index)), axis=axis))


def _cat(writer: Writer, _node: fx.Node, values: Sequence[fx.Node], axis: int = 0) -> str:
    return str(writer.write("Concat", *values, axis=axis))


def _gather(writer: Writer, _node: fx.Node, value: fx.Node, axis: int, index: fx.Node, *_: Any) -> str:
    return str(writer.write("GatherElements", value, index, axis=axis))


def _scatter_add(
    writer: Writer, _node: fx.Node, value: fx.Node, axis: int, index: fx.Node, updates: fx.Node
) -> str:
    return str(writer.write("ScatterElements", value, index, updates, axis=axis, reduction="add"))


def _to(writer: Writer, node: fx.Node, value: fx.Node) -> str:
    kinds = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64, torch.bool: TensorProto.BOOL}
    return writer.cast(value, kinds[node.meta["val"].dtype])


def _full(writer: Writer, node: fx.Node, _like: Any, value: float, *_: Any) -> str:
    number = writer.constant(_number(node, value))
    return (
        number if not sizes(node) else str(writer.write("Expand", number, writer.exact_shape(sizes(node))))
    )


def _scalar(writer: Writer, node: fx.Node, value: float, *_: Any) -> str:
    return writer.constant(_number(node, value))


def _number(node: fx.Node, value: Any) -> npt.NDArray[Any]:
    kind = {torch.float32: np.float32, torch.int64: np.int64, torch.bool: np.bool_}[node.meta["val"].dtype]
    return np.asarray(value, kind)


# --- numbers -------------------------------------------------------------------------------------


def _unary(op: str) -> Form:
    return lambda writer, _node, value: writer.write(op, value)


def _binary(op: str) -> Form:
    def form(writer: Writer, node: fx.Node, a: Any, b: Any) -> str:
        return str(writer.write(op, _operand(writer, node, a), _operand(writer, node, b)))

    return form


def _operand(writer: Writer, node: fx.Node, value: Any) -> Any:
    """A tensor, a number, or a size of the batch as a number."""
    if isinstance(value, fx.Node) and isinstance(value.meta["val"], torch.SymInt):
        return writer.cast(writer.size(value.meta["val"]), TensorProto.FLOAT)
    kinds = {one.meta["val"].dtype for one in node.all_input_nodes if isinstance(one.meta["val"], Tensor)}
    if isinstance(value, fx.Node):
        mixed = torch.float32 in kinds and value.meta["val"].dtype != torch.float32
        return writer.cast(value, TensorProto.FLOAT) if mixed else value
    return writer.constant(np.int64(value)) if kinds == {torch.int64} else value


def _clamp(writer: Writer, _node: fx.Node, value: fx.Node, low: Any = None, high: Any = None) -> str:
    limits = ["" if limit is None else limit for limit in (low, high)]
    return str(writer.write("Clip", value, *limits))


def _reduce(op: str, *, axes_are_inputs: bool = False) -> Form:
    def form(writer: Writer, node: fx.Node, value: Any, axes: Any = None, keep: bool = False) -> str:
        shape = sizes(value)
        if value.meta["val"].dtype == torch.bool:
            value = _to(writer, node, value)
        chosen = sorted(axis % len(shape) for axis in (axes or range(len(shape))))
        if axes_are_inputs:
            return str(writer.write(op, value, writer.integers(chosen), keepdims=int(keep)))
        return str(writer.write(op, value, axes=chosen, keepdims=int(keep)))

    return form


def _gelu(writer: Writer, _node: fx.Node, value: fx.Node) -> str:
    return str(writer.write("Mul", value, _normal_cdf(writer, value)))


def _normal_cdf(writer: Writer, value: fx.Node) -> str:
    erf = writer.write("Erf", writer.write("Mul", value, math.sqrt(0.5)))
    return str(writer.write("Mul", writer.write("Add", erf, 1.0), 0.5))


def _gelu_backward(writer: Writer, _node: fx.Node, gradient: fx.Node, value: fx.Node) -> str:
    square = writer.write("Mul", value, value)
    density = writer.write("Exp", writer.write("Mul", square, -0.5))
    slope = writer.write("Mul", writer.write("Mul", value, density), 1 / math.sqrt(2 * math.pi))
    return str(writer.write("Mul", gradient, writer.write("Add", slope, _normal_cdf(writer, value))))


def _softmax(writer: Writer, _node: fx.Node, value: fx.Node, axis: int, *_: Any) -> str:
    return str(writer.write("Softmax", value, axis=axis))


def _log_softmax(writer: Writer, _node: fx.Node, value: fx.Node, axis: int, *_: Any) -> str:
    return str(writer.write("LogSoftmax", value, axis=axis))


def _softmax_backward(
    writer: Writer, _node: fx.Node, gradient: fx.Node, result: fx.Node, axis: int, *_: Any
) -> str:
    total = writer.write(
        "ReduceSum", writer.write("Mul", gradient, result), writer.integers([axis]), keepdims=1
    )
    return str(writer.write("Mul", writer.write("Sub", gradient, total), result))


def _layer_norm(
    writer: Writer, _node: fx.Node, value: fx.Node, shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> Any:
    affine = [weight if weight is not None else writer.constant(np.ones(shape, np.float32))]
    affine += [bias] if bias is not None else []
    return writer.write("LayerNormalization", value, *affine, outputs=3, axis=-len(shape), epsilon=eps)


def _layer_norm_backward(
    writer: Writer,
    _node: fx.Node,
    gradient: fx.Node,
    value: fx.Node,
    shape: Sequence[int],
    mean: fx.Node,
    inverse_deviation: fx.Node,
    weight: Any,
    bias: Any,
    wanted: Sequence[bool],
) -> Any:
    outer = writer.integers(range(len(sizes(value)) - len(shape)))
    inner = list(range(-len(shape), 0))
    normal = writer.write("Mul", writer.write("Sub", value, mean), inverse_deviation)
    along = writer.write("Mul", gradient, normal)
    of_weight = writer.write("ReduceSum", along, outer, keepdims=0) if weight is not None else None
    of_bias = writer.write("ReduceSum", gradient, outer, keepdims=0) if bias is not None else None
    if not wanted[0]:
        return None, of_weight, of_bias
    scaled = gradient if weight is None else writer.write("Mul", gradient, weight)
    product = along if weight is None else writer.write("Mul", scaled, normal)
    shared = writer.write("ReduceMean", scaled, axes=inner, keepdims=1)
    part = writer.write("Mul", normal, writer.write("ReduceMean", product, axes=inner, keepdims=1))
    centred = writer.write("Sub", writer.write("Sub", scaled, shared), part)
    return writer.write("Mul", centred, inverse_deviation), of_weight, of_bias


# --- products ------------------------------------------------------------------------------------


def _matmul(writer: Writer, _node: fx.Node, a: fx.Node, b: fx.Node) -> str:
    return _gemm(writer, a, b)


def _addmm(writer: Writer, _node: fx.Node, bias: fx.Node, a: fx.Node, b: fx.Node) -> str:
    return _gemm(writer, a, b, bias)


def _gemm(writer: Writer, a: fx.Node, b: fx.Node, *bias: fx.Node) -> str:
    (left, left_order), (right, right_order) = _permutation(a), _permutation(b)
    flipped = [1, 0]
    return str(
        writer.write(
            "Gemm",
            left,
            right,
            *bias,
            transA=int(left_order == flipped),
            transB=int(right_order == flipped),
        )
    )


def _convolution(
    writer: Writer,
    _node: fx.Node,
    value: fx.Node,
    weight: fx.Node,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    _output_padding: Any,
    groups: int,
) -> str:
    if transposed:
        raise UserError("the model has a transposed convolution", "use an upsampling that ONNX knows here")
    inputs = [value, weight] + ([bias] if bias is not None else [])
    pads = [*padding, *padding]
    return str(
        writer.write(
            "Conv", *inputs, group=groups, strides=list(stride), pads=pads, dilations=list(dilation)
        )
    )


def _convolution_backward(
    writer: Writer,
    _node: fx.Node,
    gradient: fx.Node,
    value: fx.Node,
    weight: fx.Node,
    _bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    _transposed: bool,
    _output_padding: Any,
    groups: int,
    wanted: Sequence[bool],
) -> Any:
    """The gradient of the input is a transposed convolution; that of the weight is a convolution of the
    input by the gradient, with examples as channels, and stride and dilation exchanged.
    """
    pads = [*padding, *padding]
    of_value = of_weight = of_bias = None
    if wanted[0]:
        kernel = sizes(weight)[2:]
        reached = [
            (out - 1) * s - 2 * p + d * (k - 1) + 1
            for out, s, p, d, k in zip(sizes(gradient)[2:], stride, padding, dilation, kernel, strict=True)
        ]
        missing = [full - size for full, size in zip(sizes(value)[2:], reached, strict=True)]
        of_value = writer.write(
            "ConvTranspose",
            gradient,
            weight,
            group=groups,
            strides=list(stride),
            pads=pads,
            dilations=list(dilation),
            output_padding=missing,
        )
    if wanted[1]:
        channels, *image = sizes(value)[1:]
        axes = list(range(2, len(sizes(value))))
        if groups == 1:
            examples = writer.write("Transpose", value, perm=[1, 0, *axes])
        else:
            split = writer.write(
                "Reshape", value, writer.integers([-1, groups, channels // groups, *image])
            )
            moved = writer.write("Transpose", split, perm=[2, 1, 0, *[axis + 1 for axis in axes]])
            examples = writer.write("Reshape", moved, writer.integers([channels // groups, -1, *image]))
        by_channel = writer.write("Transpose", gradient, perm=[1, 0, *axes])
        found = writer.write(
            "Conv",
            examples,
            by_channel,
            group=groups,
            strides=list(dilation),
            dilations=list(stride),
            pads=pads,
        )
        kernel = sizes(weight)[2:]
        limits = [[0] * len(kernel), list(kernel), axes]
        cut = writer.write("Slice", found, *map(writer.integers, limits))
        of_weight = writer.write("Transpose", cut, perm=[1, 0, *axes])
    if wanted[2]:
        rest = [0, *range(2, len(sizes(value)))]
        of_bias = writer.write("ReduceSum", gradient, writer.integers(rest), keepdims=0)
    return of_value, of_weight, of_bias


def _embedding(writer: Writer, _node: fx.Node, weight: fx.Node, index: fx.Node, *_: Any) -> str:
    return str(writer.write("Gather", weight, index))


def _embedding_backward(
    writer: Writer, node: fx.Node, gradient: fx.Node, index: fx.Node, rows: int, padding: int, *_: Any
) -> str:
    """Rows of equal index add up; `ScatterElements` does so in one thread, `ScatterND` may not."""
    if padding >= 0:
        raise UserError("the model has an embedding with padding_idx", "mask the padding instead")
    width = sizes(node)[1]
    updates = writer.write("Reshape", gradient, writer.integers([-1, width]))
    column = writer.write("Reshape", index, writer.integers([-1, 1]))
    indices = writer.write("Expand", column, writer.integers([1, width]))
    zero = writer.write("Expand", 0.0, writer.integers([rows, width]))
    return str(writer.write("ScatterElements", zero, indices, updates, axis=0, reduction="add"))


FORMS: dict[Any, Form] = {
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.squeeze.dims: _reshape,
    aten.clone.default: _alias,
    aten._to_copy.default: _to,
    aten.alias.default: _alias,
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.cat.default: _cat,
    aten.gather.default: _gather,
    aten.scatter_add.default: _scatter_add,
    aten.full_like.default: _full,
    aten.full.default: _full,
    aten.scalar_tensor.default: _scalar,
    aten.add.Tensor: _binary("Add"),
    aten.add.Scalar: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"),
    aten.sub.Scalar: _binary("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.mul.Scalar: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    aten.div.Scalar: _binary("Div"),
    aten.maximum.default: _binary("Max"),
    aten.minimum.default: _binary("Min"),
    aten.pow.Tensor_Scalar: _binary("Pow"),
    aten.eq.Scalar: _binary("Equal"),
    aten.eq.Tensor: _binary("Equal"),
    aten.le.Scalar: _binary("LessOrEqual"),
    aten.lt.Scalar: _binary("Less"),
    aten.ge.Scalar: _binary("GreaterOrEqual"),
    aten.gt.Scalar: _binary("Greater"),
    aten.bitwise_and.Tensor: _binary("And"),
    aten.logical_and.default: _binary("And"),
    aten.logical_not.default: _unary("Not"),
    aten.neg.default: _unary("Neg"),
    aten.abs.default: _unary("Abs"),
    aten.exp.default: _unary("Exp"),
    aten.log.default: _unary("Log"),
    aten.sqrt.default: _unary("Sqrt"),
    aten.reciprocal.default: _unary("Reciprocal"),
    aten.erf.default: _unary("Erf"),
    aten.tanh.default: _unary("Tanh"),
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.relu.default: _unary("Relu"),
    aten.sin.default: _unary("Sin"),
    aten.cos.default: _unary("Cos"),
    aten.where.self: lambda writer, _node, *values: writer.write("Where", *values),
    aten.clamp.default: _clamp,
    aten.sum.dim_IntList: _reduce("ReduceSum", axes_are_inputs=True),
    aten.mean.dim: _reduce("ReduceMean"),
    aten.mean.default: _reduce("ReduceMean"),
    aten.amax.default: _reduce("ReduceMax"),
    aten.gelu.default: _gelu,
    aten.gelu_backward.default: _gelu_backward,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _log_softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.mm.default: _matmul,
    aten.addmm.default: _addmm,
    aten.bmm.default: lambda writer, _node, a, b: writer.write("MatMul", a, b),
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.embedding.default: _embedding,
    aten.embedding_dense_backward.default: _embedding_backward,
}
