"""From a bundle and trained parameters to the final model. numpy and onnx only, no torch.

Rules: the encoders of the chosen stage get their weights inside and run on any ONNX Runtime. A model cut
at an earlier stage is written the same way: it has fewer blocks and is as usable.

Next: `models/saved.py`, what the folder holds; `models/load.py`, the way back to torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import onnx
from onnx import numpy_helper

from export.folder import new_folder
from models.saved import CLASSIFIER_NAME, MODEL_NAME, WEIGHTS_NAME, SavedModel
from wire.errors import ManifestMismatch, UserError
from wire.manifest import Graph, Manifest, read_manifest
from wire.tensors import Array, Arrays, pack


def write_final(
    bundle: Path,
    parameters: Mapping[str, Array],
    out: Path,
    *,
    stage: int | None = None,
    force: bool = False,
) -> SavedModel:
    """Write the model of a stage (counted from 0; None: the last) to the folder `out`.

    parameters: torch name -> float32, at least of the groups attached by that stage.
    Raises `UserError` for a stage the bundle has not or an `out` that exists, `ManifestMismatch` where
    `parameters` are not the model's.
    """
    manifest, _ = read_manifest(bundle)
    number = len(manifest.stages) - 1 if stage is None else stage
    if not 0 <= number < len(manifest.stages):
        raise UserError(f"there is no stage {number + 1}", f"the bundle has {len(manifest.stages)} stages")
    entry = manifest.stages[number]
    values = _values(manifest, (*entry.frozen, *entry.trainable), parameters)
    saved = SavedModel(
        builder=manifest.builder,
        builder_options=manifest.builder_options,
        task=manifest.task,
        modalities=manifest.modalities,
        classes=manifest.classes,
        depths={
            name: sum(group.startswith(f"{name}.block.") for group in (*entry.frozen, *entry.trainable))
            for name in manifest.modalities
        },
    )
    with new_folder(out, MODEL_NAME, force=force) as folder:
        for name, graph in entry.encoders.items():
            (folder / f"{name}.onnx").write_bytes(_with_weights(bundle, graph, values))
        if entry.classifier is not None:
            (folder / CLASSIFIER_NAME).write_bytes(_with_weights(bundle, entry.classifier, values))
        for modality in manifest.modalities.values():
            tokenizer = modality.options.get("tokenizer")
            if isinstance(tokenizer, str):
                (folder / tokenizer).write_bytes((bundle / tokenizer).read_bytes())
        (folder / WEIGHTS_NAME).write_bytes(pack(values))
        (folder / MODEL_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(saved), indent=1))
    return saved


def _with_weights(bundle: Path, graph: Graph, values: Arrays) -> bytes:
    """The graph's file with its parameter inputs turned into initializers."""
    model = onnx.load_from_string((bundle / graph.file).read_bytes())
    inputs = [value for value in model.graph.input if value.name not in graph.parameters]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for name, torch_name in graph.parameters.items():
        model.graph.initializer.append(numpy_helper.from_array(values[torch_name], name))
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _values(manifest: Manifest, groups: tuple[str, ...], parameters: Mapping[str, Array]) -> Arrays:
    shapes = manifest.shapes_of(groups)
    for name, shape in shapes.items():
        if name not in parameters:
            raise ManifestMismatch(f"{name} is missing from the trained parameters")
        if parameters[name].shape != shape:
            raise ManifestMismatch(f"{name} is {parameters[name].shape}, expected {shape}")
    return {name: parameters[name] for name in shapes}
