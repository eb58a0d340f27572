"""The manifest: its order is kept, and what could harm a device is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wire.errors import Malformed, TooLarge
from wire.manifest import (
    FORMAT,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    AdamW,
    BlobRef,
    Graph,
    Manifest,
    Modality,
    Parameter,
    Stage,
    TensorSpec,
    decode_manifest,
    encode_manifest,
    parameter_counts,
)

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
fuzz = settings(
    derandomize=True, max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

# In no order that sorting would give.
PARAMETERS = {
    "text.stem.tokens": Parameter("text.stem", (50, 8)),
    "image.stem.patches.weight": Parameter("image.stem", (8, 3, 2, 2)),
    "head.log_scale": Parameter("head", ()),
    "image.stem.patches.bias": Parameter("image.stem", (8,)),
    "image.block.0.weight": Parameter("image.block.0", (8, 8)),
    "head.absent": Parameter("head", (0, 8)),
    "another.weight": Parameter("head", (8, 4)),
}


FILES = ("image.0.onnx", "stage.0/train.onnx", "initial.safetensors", "words.model")


def stage(**changes: Any) -> Stage:
    graph = Graph("image.0.onnx", ("image",), ("features",), {"w": "image.block.0.weight"})
    fields = {
        "trainable": ("image.stem", "image.block.0", "text.stem", "head"),
        "frozen": (),
        "rounds": 3,
        "warm_start": {},
        "inputs": {"image": TensorSpec((3, 8, 8), "float32"), "text": TensorSpec((6,), "int64")},
        "parameters": {"w": "image.block.0.weight", "b": "image.stem.patches.bias"},
        "engines": {"onnx": {"train": "stage.0/train.onnx", "eval": "image.0.onnx"}},
        "segments": {"image": graph},
        "encoders": {"image": graph},
    }
    return Stage(**{**fields, **changes})


def manifest(**changes: Any) -> Manifest:
    fields = {
        "format": FORMAT,
        "builder": "models.presets:tiny",
        "builder_options": {"width": 8, "depths": {"image": 1, "text": 0}},
        "task": "contrastive",
        "schedule": "layerwise",
        "modalities": {
            "text": Modality("text", {"text": TensorSpec((6,), "int64")}, {"tokenizer": "words.model"}),
            "image": Modality(
                "image", {"image": TensorSpec((3, 8, 8), "float32")}, {"mean": [0.5, 0.4, 0.3]}
            ),
        },
        "classes": (),
        "optimizer": AdamW(weight_decay=0.05),
        "max_batch_size": 64,
        "parameters": PARAMETERS,
        "stages": (
            stage(),
            stage(
                trainable=("image.block.0", "head"),
                frozen=("image.stem", "text.stem"),
                classifier=stage().encoders["image"],
            ),
        ),
        "initial": "initial.safetensors",
        "files": {name: BlobRef.of(name.encode()) for name in FILES},
    }
    return Manifest(**{**fields, **changes})


def with_parameters(parameters: dict[str, Parameter]) -> Manifest:
    """One whose stage names no parameter."""
    return manifest(parameters=parameters, stages=(stage(parameters={}, segments={}, encoders={}),))


def with_file(name: str) -> Manifest:
    return manifest(files={**manifest().files, name: BlobRef.of(b"")})


def document(**changes: Any) -> dict[str, Any]:
    """The manifest as JSON values."""
    return {**json.loads(encode_manifest(manifest())), **changes}


def decode_json(value: object) -> Manifest:
    return decode_manifest(json.dumps(value).encode())


def test_the_reference_of_bytes_is_their_sha256_and_length():
    assert BlobRef.of(b"") == BlobRef(EMPTY, 0)
    assert BlobRef.of(b"abc").sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert BlobRef.of(b"abc").size_bytes == 3


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (2 << 20) + 5])
def test_the_reference_of_a_file_is_that_of_its_bytes(tmp_path: Path, size: int):
    content = (bytes(range(251)) * (size // 251 + 1))[:size]
    (tmp_path / "file").write_bytes(content)
    reference = BlobRef.of_file(tmp_path / "file")
    assert reference == BlobRef.of(content)
    assert reference == BlobRef(hashlib.sha256(content).hexdigest(), size)


@pytest.mark.parametrize(
    ("sha256", "size_bytes"),
    [
        ("", 0),
        (EMPTY[:-1], 0),
        (EMPTY + "0", 0),
        (EMPTY.upper(), 0),
        (EMPTY[:-1] + "g", 0),
        (EMPTY[:-1] + "٣", 0),  # a digit, not a hex digit
        ("../" + EMPTY[3:], 0),
        (EMPTY[:-1] + "\n", 0),
        (EMPTY, -1),
        (EMPTY, 2**63),
    ],
)
def test_a_reference_that_cannot_be_is_refused(sha256: str, size_bytes: int):
    if size_bytes == 0:
        with pytest.raises(ValueError, match="sha256"):
            BlobRef(sha256, size_bytes)
    whole = document()
    whole["files"]["words.model"] = {"sha256": sha256, "size_bytes": size_bytes}
    with pytest.raises(Malformed, match="sha256" if size_bytes == 0 else "size_bytes"):
        decode_json(whole)


def test_a_blob_may_be_as_large_as_any_file():
    largest = {**manifest().files, "words.model": BlobRef(EMPTY, 2**63 - 1)}
    assert decode_manifest(encode_manifest(manifest(files=largest))).files == largest


def test_a_manifest_comes_out_as_it_went_in():
    again = decode_manifest(encode_manifest(manifest()))
    assert again == manifest()
    assert encode_manifest(again) == encode_manifest(manifest())


def test_every_order_is_kept():
    again = decode_manifest(encode_manifest(manifest()))
    assert list(again.parameters) == list(PARAMETERS) != sorted(PARAMETERS)
    assert list(again.modalities) == ["text", "image"]
    assert list(again.stages[0].parameters) == ["w", "b"]
    assert list(again.files) == list(manifest().files)
    backwards = dict(reversed(PARAMETERS.items()))
    again = decode_manifest(encode_manifest(manifest(parameters=backwards)))
    assert list(again.parameters) == list(backwards)


def test_shapes_are_tuples_that_compare_with_those_of_arrays():
    again = decode_manifest(encode_manifest(manifest()))
    assert again.parameters["image.stem.patches.weight"].shape == (8, 3, 2, 2)
    assert again.parameters["head.log_scale"].shape == ()
    assert again.stages[0].inputs["text"].shape == (6,)


@settings(fuzz, max_examples=80)
@given(names=st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=8))
def test_the_order_of_any_names_is_kept(names: list[str]):
    parameters = {name: Parameter("head", (2,)) for name in names}
    again = decode_manifest(encode_manifest(with_parameters(parameters)))
    assert list(again.parameters) == names
    assert again.names_of(("head",)) == names


def test_names_and_shapes_come_in_the_manifests_order():
    whole = manifest()
    expected = {
        "text.stem.tokens": (50, 8),
        "head.log_scale": (),
        "head.absent": (0, 8),
        "another.weight": (8, 4),
    }
    for groups in [("text.stem", "head"), ("head", "text.stem"), ("head", "text.stem", "head")]:
        assert whole.names_of(groups) == list(expected)
        assert list(whole.shapes_of(groups).items()) == list(expected.items())
    everything = tuple(dict.fromkeys(parameter.group for parameter in PARAMETERS.values()))
    assert whole.names_of(everything) == list(PARAMETERS)


def test_groups_that_are_not_there_have_no_names():
    assert manifest().names_of(()) == []
    assert manifest().names_of(("image.block.1", "image")) == []  # a part of a group's name is no group
    assert manifest().shapes_of(("image.block.1",)) == {}


def test_parameters_are_counted_for_each_group():
    assert parameter_counts(manifest()) == {
        "text.stem": 50 * 8,
        "image.stem": 8 * 3 * 2 * 2 + 8,
        "head": 1 + 0 + 8 * 4,
        "image.block.0": 64,
    }
    assert parameter_counts(with_parameters({})) == {}


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "/",
        "//host/share",
        "..",
        "../x",
        "../../x",
        "a/../../x",
        "a/..",
        "a/../b",
        "C:\\x",
        "\\x",
        "a\\..\\x",
        "..\\x",
        "\\\\host\\share",
        "..a",
        "",
        ".",
        "a//b",
        "a/",
        "a/./b",
        ".hidden",
        "a/.hidden",
        "-x",
        "~",
        "a:b",
        "a b",
        "a\n",
        "a\x00b",
        "ä",
        "a" * 101,
        "a/" + "b" * 101,
        MANIFEST_NAME,
    ],
)
def test_a_file_that_is_not_plainly_named_is_refused(name: str):
    with pytest.raises(ValueError, match="cannot name a file of a bundle"):
        with_file(name)
    whole = document()
    whole["files"][name] = {"sha256": EMPTY, "size_bytes": 0}
    with pytest.raises(Malformed, match="cannot name a file of a bundle"):
        decode_json(whole)


@pytest.mark.parametrize(
    "name",
    [
        "a.onnx",
        "stage.0/train.onnx",
        "a/b/c",
        "a..b",
        "a../b",
        "_a",
        "0",
        "A-z_9.",
        "a" * 100,
        f"a/{MANIFEST_NAME}",
    ],
)
def test_a_file_that_is_plainly_named_is_taken(name: str, tmp_path: Path):
    again = decode_manifest(encode_manifest(with_file(name)))
    assert list(again.files) == list({**dict.fromkeys(FILES), name: None})
    assert (tmp_path / name).resolve().is_relative_to(tmp_path.resolve())


@fuzz
@given(name=st.text("aZ0._-/\\ :~\n\0é", max_size=12) | st.text(max_size=12))
def test_no_file_that_is_taken_leaves_the_bundle(name: str):
    try:
        with_file(name)
    except ValueError:
        return
    folder = Path("/bundle")
    path = Path(os.path.normpath(folder / name))
    assert path.is_relative_to(folder)
    assert path != folder
    assert str(path.relative_to(folder)) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a.b", "1a", "-a", "_a", "a b", "a\n", "ä", "a" * 65]
)
def test_a_modality_that_cannot_name_a_file_is_refused(name: str):
    modalities = {**manifest().modalities, name: Modality("image", {})}
    with pytest.raises(ValueError, match="cannot name a modality"):
        manifest(modalities=modalities)
    whole = document()
    whole["modalities"][name] = whole["modalities"]["image"]
    with pytest.raises(Malformed, match="cannot name a modality"):
        decode_json(whole)


@pytest.mark.parametrize("name", ["a", "IMU", "left-camera", "x_2", "a" * 64])
def test_a_modality_that_can_name_a_file_is_taken(name: str):
    whole = manifest(modalities={**manifest().modalities, name: Modality("image", {})})
    assert decode_manifest(encode_manifest(whole)) == whole


@pytest.mark.parametrize(
    "change",
    [
        lambda stage: stage["engines"]["onnx"].pop("eval"),
        lambda stage: stage["engines"]["onnx"].update(more="words.model"),
        lambda stage: stage["engines"].update({"ort-training": {"train": "words.model"}}),
        lambda stage: stage["engines"].update(executorch={"program": "words.model"}),
    ],
    ids=["a role missing", "a role too many", "other engine", "segments of another form"],
)
def test_an_engine_without_a_file_of_each_role_is_refused(change: Callable[[dict[str, Any]], object]):
    whole = document()
    change(whole["stages"][0])
    with pytest.raises(Malformed, match=r"not the files of an engine|no program for the engine"):
        decode_json(whole)


MICRO_ROLES = {
    "contrastive": {
        "onnx": ("embed", "pairs", "gradients", "update"),
        "ort-training": ("embed", "pairs", "gradients", "optimizer", "checkpoint"),
    },
    "classification": {
        "onnx": ("gradients", "update", "eval"),
        "ort-training": ("gradients", "eval", "optimizer", "checkpoint"),
    },
}


def in_micro_batches(task: str, size: int, roles_of: str) -> dict[str, Any]:
    """A manifest of `task` whose first stage has the files of a stage in micro-batches for `roles_of`."""
    whole = document(task=task)
    whole["stages"][0]["micro_batch_size"] = size
    whole["stages"][1]["engines"]["ort-training"] = dict.fromkeys(
        ("train", "eval", "optimizer", "checkpoint"), "words.model"
    )
    whole["stages"][0]["engines"] = {
        engine: dict.fromkeys(roles, "words.model") for engine, roles in MICRO_ROLES[roles_of].items()
    }
    return whole


@pytest.mark.parametrize("task", MICRO_ROLES)
def test_a_stage_in_micro_batches_has_other_files(task: str):
    stages = decode_json(in_micro_batches(task, 64, task)).stages
    assert [stage.micro_batch_size for stage in stages] == [64, 0]


@pytest.mark.parametrize(
    ("task", "size", "roles_of"),
    [
        ("contrastive", 0, "contrastive"),
        ("contrastive", 8, "classification"),
        ("classification", 0, "classification"),
        ("classification", 8, "contrastive"),
    ],
)
def test_files_of_another_kind_of_step_are_refused(task: str, size: int, roles_of: str):
    with pytest.raises(Malformed, match="a stage has not the files of an engine"):
        decode_json(in_micro_batches(task, size, roles_of))


def test_micro_batches_need_files_of_their_own():
    whole = document()
    whole["stages"][0]["micro_batch_size"] = 8
    with pytest.raises(Malformed, match="a stage has not the files of an engine 'onnx'"):
        decode_json(whole)


@pytest.mark.parametrize("size", [65, -1, 1.5, "8"])
def test_a_micro_batch_that_cannot_be_is_refused(size: object):
    whole = in_micro_batches("contrastive", 8, "contrastive")
    whole["stages"][0]["micro_batch_size"] = size
    with pytest.raises(Malformed):
        decode_json(whole)


def test_an_engine_of_a_later_version_is_let_be():
    whole = document()
    for stage in whole["stages"]:
        stage["engines"]["abacus"] = {"beads": "words.model"}
    assert decode_json(whole).stages[0].engines["abacus"] == {"beads": "words.model"}


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: whole.update(initial="gone"),
        lambda whole: whole["modalities"]["text"]["options"].update(tokenizer="gone"),
        lambda whole: whole["stages"][1]["engines"]["onnx"].update(eval="gone"),
        lambda whole: whole["stages"][1]["segments"]["image"].update(file="gone"),
        lambda whole: whole["stages"][1]["segments"]["image"].update(program="gone"),
        lambda whole: whole["stages"][1]["encoders"]["image"].update(file="gone"),
        lambda whole: whole["stages"][1]["classifier"].update(file="gone"),
    ],
    ids=["initial", "tokenizer", "engine", "segment", "program", "encoder", "classifier"],
)
def test_a_named_file_that_is_not_listed_is_refused(change: Callable[[dict[str, Any]], object]):
    whole = document()
    change(whole)
    with pytest.raises(Malformed, match="'gone' is named and not listed among the files"):
        decode_json(whole)
    whole["files"]["gone"] = {"sha256": EMPTY, "size_bytes": 0}
    assert "gone" in decode_json(whole).files


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: whole["stages"][1]["parameters"].update(w="gone"),
        lambda whole: whole["stages"][1]["segments"]["image"]["parameters"].update(w="gone"),
        lambda whole: whole["stages"][1]["encoders"]["image"]["parameters"].update(w="gone"),
        lambda whole: whole["stages"][1]["classifier"]["parameters"].update(w="gone"),
    ],
    ids=["train step", "segment", "encoder", "classifier"],
)
def test_a_named_parameter_that_is_not_listed_is_refused(change: Callable[[dict[str, Any]], object]):
    whole = document()
    change(whole)
    with pytest.raises(Malformed, match="'gone' is named and not listed among the parameters"):
        decode_json(whole)
    whole["parameters"]["gone"] = {"group": "head", "shape": [1]}
    assert "gone" in decode_json(whole).parameters


def test_an_option_that_is_no_name_is_no_reference():
    before = manifest().modalities
    text = msgspec.structs.replace(before["text"], options={"tokenizer": 7, "length": 6})
    assert manifest(modalities=before | {"text": text}).modalities["text"] == text


def test_a_group_starts_only_from_one_of_the_same_shapes():
    alike = {**PARAMETERS, "image.block.1.weight": Parameter("image.block.1", (8, 8))}
    warm = stage(warm_start={"image.block.1": "image.block.0"})
    assert manifest(parameters=alike, stages=(stage(), warm)).stages[1] == warm
    for shape in [(8, 9), (64,), (8, 8, 1)]:
        other = {**PARAMETERS, "image.block.1.weight": Parameter("image.block.1", shape)}
        with pytest.raises(ValueError, match=r"'image\.block\.1' cannot start from 'image\.block\.0'"):
            manifest(parameters=other, stages=(stage(), warm))
    with pytest.raises(ValueError, match="which has other shapes"):  # there is no such group
        manifest(stages=(stage(), warm))


@pytest.mark.parametrize("shape", [[-1], [2, -1], [2**31 + 1], [2**63], [2**31, 5], [2**20, 2**20, 0.5]])
def test_a_parameter_that_no_device_holds_is_refused(shape: list[float]):
    whole = document()
    whole["parameters"]["another.weight"]["shape"] = shape
    with pytest.raises(Malformed, match=r"parameters\["):
        decode_json(whole)


@pytest.mark.parametrize("shape", [[2**31, 4], [2**31], [2**31, 2**31, 0], [1] * 40])
def test_a_large_parameter_is_taken_and_counted_exactly(shape: list[int]):
    whole = document()
    whole["parameters"]["large.weight"] = {"group": "large", "shape": shape}
    assert parameter_counts(decode_json(whole))["large"] == math.prod(shape)


@pytest.mark.parametrize("extent", [-1, 2**31 + 1])
def test_an_input_that_cannot_be_is_refused(extent: int):
    whole = document()
    whole["stages"][0]["inputs"]["image"]["shape"] = [3, extent]
    with pytest.raises(Malformed, match=r"stages\[.*shape"):
        decode_json(whole)


@pytest.mark.parametrize("rounds", [0, -1, 2**31 + 1])
def test_a_stage_of_no_or_endless_rounds_is_refused(rounds: int):
    whole = document()
    whole["stages"][0]["rounds"] = rounds
    with pytest.raises(Malformed, match="rounds"):
        decode_json(whole)


def with_anchors(**changes: Any) -> Manifest:
    """One whose last stage has an anchor for its pictures."""
    graph = Graph("image.0.onnx", ("image",), ("embedding",), {"w": "image.block.0.weight"})
    anchor = msgspec.structs.replace(graph, **changes)
    fed = stage().inputs | {"image_anchor": TensorSpec((8,), "float32")}
    last = stage(trainable=("image.block.0", "head"), inputs=fed, anchors={"image": anchor})
    return manifest(stages=(stage(), last))


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": ("image", "image_anchor")},
        {"inputs": ("label",)},
        {"outputs": ()},
        {"outputs": ("a", "b")},
        {"parameters": {"w": "head.log_scale"}},
    ],
)
def test_an_anchor_is_made_of_what_its_stage_trains_on(changes: dict[str, Any]):
    assert decode_manifest(encode_manifest(with_anchors())) == with_anchors()
    with pytest.raises(ValueError, match="'image_anchor' is not made of what its stage trains on"):
        with_anchors(**changes)


def test_a_stage_is_fed_with_what_there_is():
    unknown = stage(
        inputs={"image": TensorSpec((3, 8, 8), "float32"), "text_anchor": TensorSpec((8,), "float32")}
    )
    with pytest.raises(ValueError, match="'text_anchor', which is no modality's"):
        manifest(stages=(unknown,))
    (_, last) = with_anchors().stages
    with pytest.raises(ValueError, match="no input 'image_anchor'"):
        manifest(stages=(stage(anchors=last.anchors),))


@pytest.mark.parametrize("other", [0, FORMAT + 1, -1])
def test_another_format_is_refused_and_named(other: int):
    with pytest.raises(Malformed, match=f"^manifest format {other}, this Lamina reads {FORMAT}$"):
        decode_json(document(format=other))


@pytest.mark.parametrize(
    "newer", [{"format": FORMAT + 1}, {"stages": 7, "format": FORMAT + 1, "shards": ["a"]}]
)
def test_a_newer_format_is_named_whatever_else_it_has_changed(newer: dict[str, Any]):
    with pytest.raises(Malformed, match=f"^manifest format {FORMAT + 1}, this Lamina reads {FORMAT}$"):
        decode_json(newer)


def test_a_manifest_without_stages_is_refused():
    with pytest.raises(Malformed, match="at least one stage"):
        decode_json(document(stages=[]))


def test_too_large_is_refused_before_decoding():
    content = encode_manifest(manifest())
    assert decode_manifest(content.ljust(MAX_MANIFEST_BYTES)) == manifest()
    with pytest.raises(TooLarge, match=f"{MAX_MANIFEST_BYTES + 1} bytes"):
        decode_manifest(content.ljust(MAX_MANIFEST_BYTES + 1))
    with pytest.raises(TooLarge):
        decode_manifest(b"{" * (MAX_MANIFEST_BYTES + 1))  # no JSON, so it was not decoded


def test_fields_of_a_newer_exporter_are_ignored():
    newer = document(news=[1, {"deep": None}])
    newer["stages"][0]["news"] = newer["files"]["image.0.onnx"]["news"] = 1
    assert decode_json(newer) == manifest()


@pytest.mark.parametrize("depth", [2_000, 200_000])
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_a_bottomless_manifest_is_malformed(opening: bytes, depth: int):
    bottomless = opening * depth + b"1" + (b"]" if opening == b"[" else b"}") * depth
    whole = msgspec.json.encode(document(builder_options={"a": "here"}, news="here"))
    for part in (b'"a":"here"', b'"news":"here"'):  # one is read, the other skipped
        assert whole.count(part) == 1
        with pytest.raises(Malformed, match=r"^not a manifest: "):
            decode_manifest(whole.replace(part, part.replace(b'"here"', bottomless)))


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: whole.pop("parameters"),
        lambda whole: whole.update(task="regression"),
        lambda whole: whole.update(format="1"),
        lambda whole: whole.update(parameters=[]),
        lambda whole: whole["parameters"].update(x={"group": "head", "shape": [2.5]}),
        lambda whole: whole["parameters"].update(x={"group": "head"}),
        lambda whole: whole["modalities"]["image"]["inputs"].update(
            image={"shape": [3], "dtype": "float16"}
        ),
        lambda whole: whole["stages"][0].pop("rounds"),
        lambda whole: whole["stages"][1]["engines"].update(onnx=["train.onnx"]),
        lambda whole: whole["files"].update(x=EMPTY),
    ],
)
def test_what_is_no_manifest_is_malformed(change: Callable[[dict[str, Any]], object]):
    whole = document()
    change(whole)
    with pytest.raises(Malformed, match=r"^not a manifest: "):
        decode_json(whole)


def decodes_or_is_malformed(content: bytes) -> None:
    with contextlib.suppress(Malformed):
        assert isinstance(decode_manifest(content), Manifest)


@fuzz
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_decode_or_are_malformed(content: bytes):
    decodes_or_is_malformed(content)


@fuzz
@given(data=st.data())
def test_a_damaged_manifest_decodes_or_is_malformed(data: st.DataObject):
    content = bytearray(msgspec.json.encode(manifest()))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    decodes_or_is_malformed(bytes(content))
    decodes_or_is_malformed(bytes(content[: data.draw(st.integers(0, len(content)))]))
