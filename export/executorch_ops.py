"""The operations that the `executorch` engine brings kernels for.

Rules: an operation exists as a function, which a graph is written with, and in a form that writes into
given tensors, which ExecuTorch runs. Here they have shapes only. Values are float32 and contiguous.

Next: `edge_client/engines/executorch_kernels.cpp`, the kernels; `export/executorch_graph.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library: Any = torch.library.Library("lamina", "DEF")  # type: ignore[no-untyped-call]
lamina = torch.ops.lamina


def _define(name: str, arguments: str, outputs: int, shapes: Callable[..., Any]) -> None:
    """An operation of `outputs` results; `shapes` makes empty ones from the arguments."""
    outs = ["out"] if outputs == 1 else [f"out{i}" for i in range(outputs)]
    written = [f"Tensor({chr(97 + i)}!)" for i in range(outputs)]
    one, many = ("Tensor", written[0]) if outputs == 1 else (f"({', '.join(['Tensor'] * outputs)})", "")
    given = ", ".join(f"{kind} {out}" for kind, out in zip(written, outs, strict=True))
    _library.define(f"{name}({arguments}) -> {one}")
    _library.define(f"{name}.out({arguments}, *, {given}) -> {many or '(' + ', '.join(written) + ')'}")
    torch.library.register_fake(f"lamina::{name}", shapes, lib=_library)


def _like(place: int) -> Callable[..., Tensor]:
    return lambda *arguments: torch.empty_like(arguments[place])


def _row(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[-1:])


def _grid(size: Any, kernel: Any, stride: Any, padding: Any) -> list[int]:
    """Places of a kernel, down and across."""
    return [
        (full + 2 * pad - width) // step + 1
        for full, width, step, pad in zip(size, kernel, stride, padding, strict=True)
    ]


def _product(a: Tensor, b: Tensor, _bias: Tensor | None, transpose_a: bool, transpose_b: bool) -> Tensor:
    rows, columns = a.shape[-1 if transpose_a else -2], b.shape[-2 if transpose_b else -1]
    return a.new_empty((*a.shape[:-2], rows, columns))


_define(
    "matmul", "Tensor a, Tensor b, Tensor? bias, bool transpose_a, bool transpose_b", 1, _product
)  # [M, K] [K, N], or a batch of them
_define("permute", "Tensor x, int[] order", 1, lambda x, order: x.new_empty([x.shape[i] for i in order]))
# All that follow work along the last axis.
_define("softmax", "Tensor x", 1, _like(0))
_define("softmax_backward", "Tensor gradient, Tensor y", 1, _like(0))
_define("gelu", "Tensor x", 1, _like(0))
_define("gelu_backward", "Tensor gradient, Tensor x", 1, _like(0))
_NORM = "Tensor gradient, Tensor x, Tensor mean, Tensor rstd"
_define("layer_norm_backward", f"{_NORM}, Tensor weight", 1, _like(0))
_define("layer_norm_backward_weights", _NORM, 2, lambda _, x, *__: (_row(x), _row(x)))
_define("sum_rows", "Tensor x", 1, lambda x: _row(x))
_define(
    "embedding_backward",
    "Tensor gradient, Tensor index, int rows",
    1,
    lambda gradient, _, rows: gradient.new_empty((rows, gradient.shape[-1])),
)
_define(
    "unfold",
    "Tensor x, int[] kernel, int[] stride, int[] padding",
    1,
    lambda x, kernel, stride, padding: x.new_empty(
        (x.shape[0], math.prod(_grid(x.shape[2:], kernel, stride, padding)), x.shape[1] * math.prod(kernel))
    ),
)  # images [B, C, H, W] -> the patch under each place of a kernel [B, places, C * kernel]
_define(
    "fold",
    "Tensor patches, int[] size, int[] kernel, int[] stride, int[] padding",
    1,
    lambda patches, size, *_: patches.new_empty((patches.shape[0], *size)),
)  # its gradient; size: C, H, W
_define(
    "adamw",
    "Tensor p, Tensor m, Tensor v, Tensor gradient, Tensor step, Tensor learning_rate, "
    "float beta1, float beta2, float eps, float weight_decay",
    3,
    lambda p, *_: tuple(torch.empty_like(p) for _ in range(3)),
)
