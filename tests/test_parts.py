"""What one client sees of a bundle: fewer modalities, or shallower train steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from small_models import arrays, bundle, small, values_of

from edge_client.engines import ONNX, open_engine
from export.stage import example
from wire.errors import UserError
from wire.manifest import Manifest, decode_manifest, encode_manifest
from wire.parts import with_modalities, within

MB = 10**6


def needing(manifest: Manifest, megabytes: Sequence[int]) -> Manifest:
    stages = zip(manifest.stages, megabytes, strict=True)
    return replace(manifest, stages=tuple(replace(one, expected_peak_bytes=n * MB) for one, n in stages))


def trains(manifest: Manifest) -> list[tuple[str, ...]]:
    return [stage.trainable for stage in manifest.stages]


@pytest.fixture(scope="module")
def progressive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("progressive") / "bundle"
    model = small("classification")
    made = bundle(model, folder, "progressive", engines=[ONNX], missing_modalities=True, alignment=0.5)
    return folder, needing(made.manifest, (100, 120, 140))


@pytest.mark.parametrize(
    ("megabytes", "depths"), [(140, (0, 1, 2)), (139, (0, 1, 1)), (120, (0, 1, 1)), (100, (0, 0, 0))]
)
def test_a_stage_that_needs_too_much_trains_as_an_earlier_one(
    progressive: tuple[Path, Manifest], megabytes: int, depths: tuple[int, ...]
) -> None:
    whole = progressive[1]
    seen = within(whole, megabytes * MB)
    assert trains(seen) == [whole.stages[depth].trainable for depth in depths]
    assert [stage.anchors for stage in seen.stages] == [whole.stages[depth].anchors for depth in depths]
    assert [stage.rounds for stage in seen.stages] == [stage.rounds for stage in whole.stages]
    assert decode_manifest(encode_manifest(seen)) == seen


def test_a_client_that_fits_into_no_stage_is_told_what_it_needs(progressive: tuple[Path, Manifest]) -> None:
    with pytest.raises(UserError, match="stage 1 needs 100 MB of memory, allowed are 99") as raised:
        within(progressive[1], 99 * MB)
    assert raised.value.hint


def test_a_block_that_is_frozen_cannot_be_trained_instead(tmp_path: Path) -> None:
    made = bundle(small(), tmp_path / "bundle", "layerwise", engines=[ONNX])
    whole = needing(made.manifest, (100, 90, 110))
    assert within(whole, 110 * MB) == whole
    with pytest.raises(UserError, match="stage 3 needs 110 MB"):
        within(whole, 105 * MB)


def test_an_unknown_need_fits(progressive: tuple[Path, Manifest]) -> None:
    unknown = needing(progressive[1], (0, 0, 0))
    assert within(unknown, MB) == unknown


def test_both_together_train(progressive: tuple[Path, Manifest]) -> None:
    folder, whole = progressive
    seen = with_modalities(within(whole, 120 * MB), ("image",))
    assert seen.stages[2].trainable == (
        "image.stem",
        "image.block.0",
        "image.block.1",
        "head",
        "head.image",
    )
    assert {name for name in seen.stages[2].inputs if name.endswith("anchor")} == {"image_anchor"}
    model = small("classification")
    batch = arrays(example(seen.stages[2].inputs, 5, {"label": 3}, torch.Generator().manual_seed(0)))
    with open_engine(ONNX, folder.joinpath, seen, 2) as engine:
        engine.load(values_of(model))
        losses = [engine.train_step(batch, 1e-2) for _ in range(20)]
        trained = engine.parameters()
    assert losses[-1] < 0.5 * losses[0]
    assert {whole.parameters[name].group for name in trained} == set(seen.stages[2].trainable)
