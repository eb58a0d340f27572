"""A cut of the torch model as an ONNX graph, the same bytes every time.

Rules: opset 17, standard operations, a dynamic batch axis called `batch`. Parameters keep their local
names; `weights_as_inputs` makes graph inputs of them, so no graph holds a weight. Nothing in the file
depends on values, paths or versions: equal structure gives equal bytes.

The TorchScript exporter is meant: it is 20 to 60 times faster than the newer one on these graphs and
logs nothing. It must see a module in training mode, otherwise it merges initializers of equal value.

Next: `export/ort_training.py`, which builds gradients on such a graph.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import onnx
import torch
from onnx import ModelProto, TensorProto, helper

from export.stage import Cut, example

OPSET = 17
IR_VERSION = 8
PRODUCER = "lamina"
_TRACE_BATCH = 3  # not 1, which the exporter could take for a broadcast axis
BATCH = "batch"  # the open axis


def trace(cut: Cut) -> ModelProto:
    """The graph of `cut`: its inputs and outputs by name, parameters as initializers."""
    limits = dict.fromkeys(cut.inputs, 1)
    inputs = example(cut.inputs, _TRACE_BATCH, limits, torch.Generator().manual_seed(0))
    file: Any = io.BytesIO()  # which the exporter takes, though its annotation says paths only
    cut.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the exporter itself: see above
        torch.onnx.export(
            cut,
            tuple(inputs.values()),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=list(cut.inputs),
            output_names=list(cut.outputs),
            dynamic_axes={name: {0: BATCH} for name in cut.inputs},
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
        )
    cut.eval()
    model = onnx.load_from_string(file.getvalue())
    _declare_outputs(model, cut)
    normalise(model)
    return model


def weights_as_inputs(model: ModelProto, names: list[str]) -> None:
    """Turn the initializers of these names into graph inputs, in this order."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in names:
        tensor = weights.pop(name)
        model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights.values())


def normalise(model: ModelProto) -> None:
    """Remove what differs between two exports of one structure: doc strings, producer, metadata."""
    model.producer_name, model.producer_version, model.doc_string = PRODUCER, "", ""
    model.ir_version = IR_VERSION
    del model.metadata_props[:]
    model.graph.name, model.graph.doc_string = PRODUCER, ""
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]


def content(model: ModelProto) -> bytes:
    """The file's bytes."""
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _declare_outputs(model: ModelProto, cut: Cut) -> None:
    """Leave the batch as the only open axis of an output; the exporter names others after nodes."""
    for output in model.graph.output:
        shape = output.type.tensor_type.shape
        for axis, dim in enumerate(shape.dim):
            if not dim.HasField("dim_value"):
                dim.dim_param = BATCH if axis == 0 else f"{output.name}_{axis}"
    del model.graph.value_info[:]
    assert [output.name for output in model.graph.output] == list(cut.outputs)
    assert all(tensor.data_type == TensorProto.FLOAT for tensor in model.graph.initializer)
