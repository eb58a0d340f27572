"""The `ort-training` engine's files: train, eval and optimizer graphs and a checkpoint without weights.

Rules: every parameter of the stage's graph trains, so all require a gradient; what is frozen is not in
it, in the order given: that of the engine's flat buffer. The checkpoint is a nominal one (names, no
values): devices copy the offered values into it. AdamW
follows torch.optim.AdamW, whose weight decay comes before the step (`adam_mode` 0).

Next: `edge_client/engines/ort_training.py`, which runs these.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto, helper

from export.graph import IR_VERSION, OPSET, PRODUCER, content, normalise
from wire.manifest import AdamW

_MICROSOFT = "com.microsoft"
_TORCH_ADAMW = 0  # AdamWOptimizer's adam_mode; 1 is Hugging Face's, which decays after the step


def training_files(model: ModelProto, parameters: list[str], optimizer: AdamW) -> dict[str, bytes]:
    """Role -> file content, for the roles `train`, `eval`, `optimizer` and `checkpoint`.

    model: the loss graph with `parameters` as initializers; it is changed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnxruntime.training's imports warn of torch's and its own age
        from onnxruntime.training import artifacts

    _add_norm_statistics(model)
    with tempfile.TemporaryDirectory(prefix="lamina-") as name, _quiet_stderr():
        folder = Path(name)
        artifacts.generate_artifacts(
            model, requires_grad=sorted(parameters), artifact_directory=folder, nominal_checkpoint=True
        )
        files = {"checkpoint": (folder / "nominal_checkpoint").read_bytes()}
        for role, file in (("train", "training_model.onnx"), ("eval", "eval_model.onnx")):
            graph = onnx.load(folder / file)
            normalise(graph)
            files[role] = content(graph)
            order = [value.name for value in graph.graph.input if value.name in parameters]
            assert order == parameters, "the flat buffer has another order"
    return files | {"optimizer": content(_adamw(optimizer))}


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The gradient builder logs each of its steps to file descriptor 2, at any log level."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as sink:  # noqa: PTH123 - not a path of ours
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _add_norm_statistics(model: ModelProto) -> None:
    """LayerNormalization's gradient needs its mean and inverse deviation, which exporters leave out."""
    for node in model.graph.node:
        if node.op_type == "LayerNormalization" and len(node.output) == 1:
            node.output.extend([f"{node.output[0]}.mean", f"{node.output[0]}.inverse_deviation"])


def _adamw(settings: AdamW) -> ModelProto:
    """One AdamWOptimizer node over sequences of all parameters, gradients and moments."""
    scalars = [
        helper.make_tensor_value_info("learning_rate", TensorProto.FLOAT, [1]),
        helper.make_tensor_value_info("step", TensorProto.INT64, [1]),
    ]
    sequences = [
        helper.make_tensor_sequence_value_info(name, TensorProto.FLOAT, None)
        for name in ("params", "gradients", "first_order_moments", "second_order_moments")
    ]
    node = helper.make_node(
        "AdamWOptimizer",
        [value.name for value in (*scalars, *sequences)],
        ["updated"],
        domain=_MICROSOFT,
        alpha=settings.beta1,
        beta=settings.beta2,
        epsilon=settings.eps,
        weight_decay=settings.weight_decay,
        correct_bias=1,
        adam_mode=_TORCH_ADAMW,
    )
    updated = helper.make_tensor_value_info("updated", TensorProto.BOOL, [1])
    graph = helper.make_graph([node], PRODUCER, [*scalars, *sequences], [updated])
    model = helper.make_model(
        graph,
        producer_name=PRODUCER,
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(_MICROSOFT, 1)],
    )
    normalise(model)
    return model
