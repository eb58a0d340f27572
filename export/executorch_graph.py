"""A graph of ATen operations, rewritten for the `executorch` engine.

Rules: a transposed operand of a product is a flag, a convolution is a product of patches, a number is no
tensor. What only renames a value (a view of a view, a clone, a permutation undone) disappears. Every value
is contiguous, so a view is free. It says -1 for the batch, and no size is ever computed. An operation
that has no form here stays as it is: ExecuTorch has kernels for all of core ATen.

Next: `export/executorch_ops.py`, the operations.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from export.executorch_ops import lamina
from export.step import aten, is_open
from wire.errors import UserError


def refusal(what: str) -> UserError:
    """For a model that this engine cannot train, and others can."""
    return UserError(
        f"the model has {what}, which has no form for the engine executorch",
        "change the model, or export for other engines (--engine)",
    )


def simplify(graph: fx.Graph) -> None:
    """Rewrite in place. Every node has `meta["val"]`, and so has every node that is written.

    Raises `UserError` for what the engine cannot train.
    """
    for node in list(graph.nodes):
        if node.op == "get_attr":
            raise refusal("a buffer")
        if node.op != "call_function":
            continue
        with graph.inserting_before(node):
            made = _FORMS.get(node.target, _again)(graph, node)
        if made is not None and made is not node:
            node.replace_all_uses_with(made)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def write(graph: fx.Graph, target: Any, *args: Any) -> Any:
    """Add a call; its `meta["val"]` is computed."""
    return _again(graph, graph.call_function(target, args))


def _again(graph: fx.Graph, node: Any) -> Any:
    """The same operation, on values that may have other strides than before: all are contiguous now, so an
    alias is a copy, which for a view is free.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: one.meta["val"])
    target: Any = node.target
    with next(iter(graph.nodes)).meta["val"].fake_mode:
        value = target(*args, **kwargs)
        if isinstance(target, torch._ops.OpOverload) and any(
            one.alias_info for one in target._schema.returns
        ):
            packet = getattr(aten, f"{target._schema.name.removeprefix('aten::')}_copy")
            node.target, value = getattr(packet, target._overloadname), value.new_empty(value.shape)
        elif isinstance(value, Tensor):
            value = value.contiguous()
    node.meta["val"] = value
    return node


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _view(graph: fx.Graph, node: Any) -> Any:
    source: Any = node.args[0]
    while _is(source, aten.view_copy.default):
        source = source.args[0]
    sizes = _shape(node)
    if len(sizes) == len(_shape(source)) and all(
        a == b for a, b in zip(sizes, _shape(source), strict=True)
    ):
        return source
    if sum(map(is_open, sizes)) > 1:
        raise refusal("a value with two sizes that depend on the batch")
    return write(graph, aten.view.default, source, [-1 if is_open(size) else size for size in sizes])


def _squeezed(graph: fx.Graph, node: Any) -> Any:
    sizes = [-1 if is_open(size) else size for size in _shape(node)]
    made = write(graph, aten.view.default, node.args[0], sizes)
    return _view(graph, made)


def _permute(graph: fx.Graph, node: Any) -> Any:
    source, order = node.args[0], [axis % len(_shape(node)) for axis in node.args[1]]
    if _is(source, lamina.permute.default):
        order = [source.args[1][axis] for axis in order]
        source = source.args[0]
    if order == sorted(order):
        return source
    return write(graph, lamina.permute.default, source, order)


def _source(_graph: fx.Graph, node: Any) -> Any:
    return node.args[0]


def _expand(_graph: fx.Graph, node: Any) -> Any:
    source: Any = node.args[0]
    same = len(_shape(source)) == len(_shape(node)) and all(
        a == b for a, b in zip(_shape(source), _shape(node), strict=True)
    )
    return source if same else _again(_graph, node)


def _slice(_graph: fx.Graph, node: Any) -> Any:
    return node.args[0] if _shape(node.args[0]) == _shape(node) else _again(_graph, node)


def _matmul(graph: fx.Graph, node: Any) -> Any:
    *bias, a, b = node.args
    (a, flip_a), (b, flip_b) = _operand(graph, a), _operand(graph, b)
    return write(graph, lamina.matmul.default, a, b, bias[0] if bias else None, flip_a, flip_b)


def _operand(graph: fx.Graph, node: Any) -> tuple[fx.Node, bool]:
    """An operand without its transposition, and whether it had one."""
    view = _is(node, aten.view_copy.default)
    permuted: Any = node.args[0] if view else node
    if not _is(permuted, lamina.permute.default):
        return node, False
    order = list(permuted.args[1])
    rank = len(order)
    if order[-2] != rank - 1 or (view and _shape(node)[-2:] != _shape(permuted)[-2:]):
        return node, False
    order[-2:] = order[:-3:-1]
    source = permuted.args[0]
    if order != sorted(order):
        source = write(graph, lamina.permute.default, source, order)
    if view:
        *sizes, rows, columns = node.args[1]
        source = _view(graph, write(graph, aten.view.default, source, [*sizes, columns, rows]))
    return source, True


def _softmax(graph: fx.Graph, node: Any) -> Any:
    if node.args[1] not in (-1, len(_shape(node)) - 1):
        return _again(graph, node)
    return write(graph, lamina.softmax.default, node.args[0])


def _softmax_backward(graph: fx.Graph, node: Any) -> Any:
    if node.args[2] not in (-1, len(_shape(node)) - 1):
        raise refusal("a softmax that is not over the last axis")
    return write(graph, lamina.softmax_backward.default, *node.args[:2])


def _gelu(graph: fx.Graph, node: Any) -> Any:
    return _again(graph, node) if node.kwargs else write(graph, lamina.gelu.default, node.args[0])


def _gelu_backward(graph: fx.Graph, node: Any) -> Any:
    if node.kwargs:
        raise refusal("a GELU approximated by tanh")
    return write(graph, lamina.gelu_backward.default, *node.args)


def _layer_norm_backward(graph: fx.Graph, node: Any) -> Any:
    gradient, x, _, mean, rstd, weight, bias, wanted = node.args
    if weight is None or bias is None:
        raise refusal("a norm without weight or bias")
    parts: list[Any] = [None, None, None]
    if wanted[0]:
        parts[0] = write(graph, lamina.layer_norm_backward.default, gradient, x, mean, rstd, weight)
    both = write(graph, lamina.layer_norm_backward_weights.default, gradient, x, mean, rstd)
    for place in (0, 1):
        parts[place + 1] = write(graph, operator.getitem, both, place)
    return _replace_parts(node, parts)


def _embedding_backward(graph: fx.Graph, node: Any) -> Any:
    gradient, index, rows, padding, scaled = node.args
    if padding not in (-1, None) or scaled:
        raise refusal("an embedding with padding_idx or scaled gradients")
    return write(graph, lamina.embedding_backward.default, gradient, index, rows)


def _places(graph: fx.Graph, image: Any) -> Any:
    """[B, C, H, W] -> one row for each place [B * H * W, C]."""
    channels = _shape(image)[1]
    rows = write(graph, aten.view.default, image, [-1, channels, math.prod(_shape(image)[2:])])
    turned = write(graph, lamina.permute.default, rows, [0, 2, 1])
    return write(graph, aten.view.default, turned, [-1, channels])


def _convolution(graph: fx.Graph, node: Any) -> Any:
    """A product of patches and kernels, where it is a plain one; ExecuTorch has a slow kernel for all."""
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
    if transposed or groups != 1 or set(dilation) != {1} or len(_shape(x)) != 4:
        return _again(graph, node)
    channels, *_, down, across = _shape(weight)
    patches = write(graph, lamina.unfold.default, x, [down, across], stride, padding)
    flat = write(graph, aten.view.default, patches, [-1, _shape(patches)[-1]])
    kernels = write(graph, aten.view.default, weight, [channels, -1])
    product = write(graph, lamina.matmul.default, flat, kernels, bias, False, True)
    rows = write(graph, aten.view.default, product, [-1, _shape(patches)[1], channels])
    turned = write(graph, lamina.permute.default, rows, [0, 2, 1])
    return write(graph, aten.view.default, turned, [-1, *_shape(node)[1:]])


def _convolution_backward(graph: fx.Graph, node: Any) -> Any:
    gradient, x, weight, _, stride, padding, dilation, transposed, _, groups, wanted = node.args
    if transposed or groups != 1 or set(dilation) != {1} or len(_shape(x)) != 4:
        return _again(graph, node)
    kernel = list(_shape(weight)[2:])
    rows = _places(graph, gradient)
    kernels = write(graph, aten.view.default, weight, [_shape(weight)[0], -1])
    parts: list[Any] = [None, None, None]
    if wanted[0]:
        product = write(graph, lamina.matmul.default, rows, kernels, None, False, False)
        patches = write(
            graph, aten.view.default, product, [-1, math.prod(_shape(gradient)[2:]), _shape(kernels)[1]]
        )
        parts[0] = write(graph, lamina.fold.default, patches, list(_shape(x)[1:]), kernel, stride, padding)
    patches = write(graph, lamina.unfold.default, x, kernel, stride, padding)
    flat = write(graph, aten.view.default, patches, [-1, _shape(patches)[-1]])
    product = write(graph, lamina.matmul.default, rows, flat, None, True, False)
    parts[1] = write(graph, aten.view.default, product, list(_shape(weight)))
    if wanted[2]:
        parts[2] = write(graph, lamina.sum_rows.default, rows)
    return _replace_parts(node, parts)


def _replace_parts(node: Any, parts: list[Any]) -> Any:
    """Put values in the place of a node's results; nothing uses the node any more."""
    for user in list(node.users):
        if user.users:
            user.replace_all_uses_with(parts[user.args[1]])
    return node


def _sum(graph: fx.Graph, node: Any) -> Any:
    """Over all leading axes: of a bias' gradient, or of positions'."""
    source: Any = node.args[0]
    axes, rest = list(node.args[1]), _shape(source)[len(node.args[1]) :]
    if (
        axes != list(range(len(axes)))
        or not rest
        or any(map(is_open, rest))
        or any(map(is_open, _shape(node)))
    ):
        return _again(graph, node)
    rows = write(graph, aten.view.default, source, [-1, math.prod(rest)])
    total = write(graph, lamina.sum_rows.default, _view(graph, rows))
    return _view(graph, write(graph, aten.view.default, total, list(_shape(node))))


_SCALARS: dict[Any, Any] = {  # operation on a tensor -> the same with a number
    aten.add.Tensor: aten.add.Scalar,
    aten.sub.Tensor: aten.sub.Scalar,
    aten.mul.Tensor: aten.mul.Scalar,
    aten.div.Tensor: aten.div.Scalar,
}


def _scalar(graph: fx.Graph, node: Any) -> Any:
    a, b = node.args
    if node.kwargs.get("alpha", 1) != 1:
        raise refusal("a sum with a factor (alpha)")
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return _again(graph, node)
    if isinstance(b, fx.Node):
        if node.target is aten.sub.Tensor:
            return write(graph, aten.rsub.Scalar, b, a)
        if node.target is aten.div.Tensor:
            return write(graph, aten.mul.Scalar, write(graph, aten.reciprocal.default, b), a)
        a, b = b, a
    return write(graph, _SCALARS[node.target], a, b)


_FORMS: dict[Any, Callable[[fx.Graph, Any], Any]] = {
    aten.view.default: _view,
    aten.unsqueeze.default: _squeezed,
    aten.squeeze.dims: _squeezed,
    aten.permute.default: _permute,
    aten.clone.default: _source,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.addmm.default: _matmul,
    aten._softmax.default: _softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.gelu.default: _gelu,
    aten.gelu_backward.default: _gelu_backward,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.sum.dim_IntList: _sum,
    **dict.fromkeys(_SCALARS, _scalar),
}


def recompute(graph: fx.Graph) -> None:
    """Compute GELUs and norms once more for a weight's gradient, instead of keeping them until then.

    They are the cheapest third of what a block would keep.
    """
    for node in list(graph.nodes):
        norm = node.target is operator.getitem and node.args[0].target is aten.native_layer_norm.default
        if node.target is not lamina.gelu.default and not (norm and node.args[1] == 0):
            continue
        later = [
            (value, user)
            for value in (node, *(one for one in node.users if one.target is aten.view_copy.default))
            for user in value.users
            if user.target is lamina.matmul.default and user.args[3]
        ]
        order = {one: place for place, one in enumerate(graph.nodes)}
        later.sort(key=lambda pair: order[pair[1]])
        again: dict[Any, Any] = {}
        for value, user in later:
            with graph.inserting_before(later[0][1]):
                if not again:
                    source = node.args[0]
                    made = write(graph, source.target, *source.args) if norm else source
                    again[node] = write(graph, node.target, made, *node.args[1:])
                if value not in again:
                    again[value] = write(graph, aten.view.default, again[node], value.args[1])
            user.replace_input_with(value, again[value])


_OVER = {  # operation -> the arguments that its result may be written over
    "lamina::gelu": (0,),
    "lamina::gelu_backward": (0,),
    "lamina::softmax": (0,),
    "lamina::softmax_backward": (0,),
    "lamina::layer_norm_backward": (0,),
    "aten::add": (0, 1),
    "aten::mul": (0,),
    "aten::div": (0,),
}


def write_over(graph: fx.Graph, view: Any) -> None:
    """Let operations write their result over an argument that nothing needs any more.

    graph: in ExecuTorch's out-form, where `view` is its view. Both nodes then have one `meta["spec"]`.
    """
    nodes = list(graph.nodes)
    place = {node: number for number, node in enumerate(nodes)}
    roots: dict[fx.Node, fx.Node] = {}  # a value -> the one whose memory it lies in
    last: dict[fx.Node, int] = {}
    for node in nodes:
        over = node.target is view and node.args[0]
        roots[node] = roots[over] if over else node
        last[roots[node]] = max([last.get(roots[node], 0), *(place[user] for user in node.users)])
    for node in nodes:
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        for argument in _OVER.get(name, ()):
            value: Any = node.args[argument]
            if (
                isinstance(value, fx.Node)
                and isinstance(value.meta["val"], Tensor)
                and value.meta["val"].dtype == node.meta["val"].dtype
                and roots[value].op == "call_function"
                and last[roots[value]] == place[node]
                and last[roots[node]] < len(nodes) - 1  # not an output
                and value.meta["val"].shape == node.meta["val"].shape
            ):
                out = node.kwargs["out"]
                node.kwargs = {**node.kwargs, "out": value}
                node.meta["spec"] = value.meta["spec"]
                graph.erase_node(out)
                root, own = roots[value], roots[node]
                last[root] = last[own]
                for one in [one for one, its in roots.items() if its is own]:
                    roots[one] = root
                break
