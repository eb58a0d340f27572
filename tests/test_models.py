from __future__ import annotations

import math

import pytest
import torch
from small_models import small, three

from export.parity import input_limits
from export.stage import example
from models.model import group_of, parameter_groups
from models.registry import PRESETS, build, full_options
from models.series import KERNEL, series_encoder
from wire.errors import UserError


def batch_of(model, size, seed=0):
    return example(model.inputs, size, input_limits(model), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_and_says_how_to_build_it_again(name):
    model = build(name)
    assert model.builder == PRESETS[name][0]
    again = build(model.builder, **model.builder_options)
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert again.builder_options == model.builder_options


def test_tiny_is_as_small_as_it_says():
    assert 1.3e6 < sum(p.numel() for p in build("tiny").parameters()) < 2e6


def test_the_same_seed_builds_the_same_weights():
    one, two, other = small(seed=3), small(seed=3), small(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.image.stem.embed.weight, other.image.stem.embed.weight)


def test_groups_follow_the_modules():
    groups = parameter_groups(small())
    assert list(groups) == [
        "image.stem",
        "image.block.0",
        "image.block.1",
        "image.block.2",
        "text.stem",
        "text.block.0",
        "text.block.1",
        "head",
        "head.image",
        "head.text",
    ]
    both = ("image", "text")
    assert all(group_of(name, both) == group for group, names in groups.items() for name in names)
    assert [n for names in groups.values() for n in names] == [n for n, _ in small().named_parameters()]


def test_a_head_of_ones_own_may_be_nested():
    assert group_of("head.mlp.0.weight", ("image", "text")) == "head"
    assert group_of("head.fuse.image.weight", ("image", "text")) == "head.image"


def test_modalities_tell_a_device_what_to_make():
    image, text = small().modalities["image"], small().modalities["text"]
    assert image.inputs["image"].shape == (3, 8, 8)
    assert image.options["size"] == 8
    assert {name: (spec.shape, spec.dtype) for name, spec in text.inputs.items()} == {
        "text": ((6,), "int64"),
        "text_mask": ((6,), "float32"),
    }
    assert text.options == {"tokenizer": "tokenizer.model", "vocabulary": 60, "length": 6}


@pytest.mark.parametrize("task", ["contrastive", "classification"])
def test_padding_changes_nothing(task):
    model = small(task).eval()
    batch = batch_of(model, 5)
    batch["text_mask"][:, 3:], batch["text_mask"][:, :3] = 0, 1
    before = model(batch)
    batch["text"][:, 3:] = (batch["text"][:, 3:] + 7) % 60
    assert torch.equal(model(batch), before)
    batch["text"][:, :3] = (batch["text"][:, :3] + 7) % 60
    assert not torch.equal(model(batch), before)


def test_a_text_without_tokens_is_finite():
    model = small()
    batch = batch_of(model, 3)
    batch["text_mask"][1] = 0
    loss = model(batch)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    "depths", [{"image": 1, "text": 1}, {"image": 2, "text": 2}, {"image": 3, "text": 1}]
)
def test_the_head_fits_every_depth(depths):
    model = small("classification")
    model.cut(depths)
    assert model.depths == depths
    assert math.isfinite(model(batch_of(model, 4)).item())


def test_contrastive_embeddings_have_length_one_and_one_example_has_no_loss():
    model = small()
    embeddings = model.embed(batch_of(model, 4))
    for embedding in embeddings.values():
        assert embedding.shape == (4, 8)
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4))
    assert abs(model(batch_of(model, 1)).item()) < 1e-5


def test_the_contrastive_loss_is_the_cross_entropy_over_rows_and_columns():
    model = small()
    batch = batch_of(model, 7)
    embeddings = model.embed(batch)
    logits = model.head.log_scale.exp() * embeddings["image"] @ embeddings["text"].T
    target = torch.arange(7)
    entropy = torch.nn.functional.cross_entropy
    expected = (entropy(logits, target) + entropy(logits.T, target)) / 2
    torch.testing.assert_close(model(batch), expected)


def test_the_classification_loss_is_the_cross_entropy():
    model = small("classification")
    batch = batch_of(model, 7)
    logits = model.head.logits(model.embed(batch))
    assert logits.shape == (7, 3)
    torch.testing.assert_close(model(batch), torch.nn.functional.cross_entropy(logits, batch["label"]))


def test_the_temperature_is_bounded():
    model = small()
    batch = batch_of(model, 4)
    with torch.no_grad():
        model.head.log_scale.fill_(math.log(100.0))
        at_bound = model(batch)
        model.head.log_scale.fill_(50.0)
    above = model(batch)
    above.backward()
    torch.testing.assert_close(above, at_bound)
    assert model.head.log_scale.grad.item() == 0.0


def test_three_modalities_are_the_mean_over_pairs():
    torch.manual_seed(0)
    model = three(width=16)
    batch = batch_of(model, 5)
    embeddings = model.embed(batch)
    scale = model.head.log_scale.exp()
    pairs = [("left", "right"), ("left", "text"), ("right", "text")]
    expected = [model.head._pair(scale, embeddings[a], embeddings[b]) for a, b in pairs]
    torch.testing.assert_close(model(batch), torch.stack(expected).mean())


def test_a_users_own_builder():
    model = build("small_models:three", width=16)
    assert (model.builder, model.builder_options) == ("small_models:three", {"width": 16, "blocks": 2})
    assert list(model.modalities) == ["left", "right", "text"]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("tinny", {}, "did you mean tiny"),
        ("nowhere.at_all:builder", {}, "cannot load"),
        ("small_models:missing", {}, "cannot load"),
        ("small_models:BUILDER", {}, "not a function"),
        ("small_models:not_a_model", {}, "returned str"),
        ("small_models:three", {}, "cannot be built"),
        ("tiny", {"with": 3}, "no option 'with'"),
        ("tiny", {"width": "wide"}, "cannot be built"),
        ("tiny", {"width": object()}, "not a JSON value"),
        ("tiny", {"image_blocks": 0}, "without blocks"),
        ("tiny", {"patch": 5}, "do not tile"),
        ("tiny", {"heads": 3}, "do not divide"),
        ("tiny", {"task": "regression"}, "no task"),
        ("tiny", {"task": "classification"}, "0 classes"),
        ("digits", {"task": "regression"}, "no task"),
        ("digits", {"series_patch": 3}, "do not tile a length of 32"),
        ("digits", {"series_stem": "fir"}, "no stem 'fir'"),
        ("digits", {"series_std": [1.0, 2.0]}, "2 values for 13 channels"),
        ("digits", {"series": "head"}, "cannot name a modality"),
        ("watch", {"sensors": []}, "of the sensors []"),
        ("watch", {"sensors": ["a", "a"]}, "of the sensors"),
        ("watch", {"stds": [1.0]}, "1 stds of 2 sensors"),
        ("watch", {"heads": 5}, "do not divide"),
        ("watch", {"channels": 0}, "0 channels"),
        ("image-audio", {"hop_ms": 30}, "every 30 ms"),
        ("image-audio", {"rate_hz": 0}, "at 0 Hz"),
        ("image-audio", {"audio_patch": 7}, "do not tile a length of 200"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(name, options, says):
    with pytest.raises(UserError) as caught:
        build(name, **options)
    text = f"{caught.value} {caught.value.hint}"
    assert says in text
    assert "\n" not in text
    assert caught.value.hint


def test_a_block_that_starts_as_the_identity_changes_nothing_and_learns():
    model = small(image_blocks=3)
    features = torch.randn((2, 4, 16), generator=torch.Generator().manual_seed(0))
    first, second, _ = model.image.blocks
    assert not torch.allclose(first(features), features)
    assert torch.equal(second(features), features)
    second(features).pow(2).mean().backward()
    assert second.down.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_a_conv_stem_has_the_grid_of_the_patches(patch):
    model = build("models.image_text:image_text", size=16, patch=patch, stem="conv", width=16, heads=2)
    features = model.image.stem(torch.randn((3, 3, 16, 16)))
    assert features.shape == (3, (16 // patch) ** 2, 16)
    assert features.shape[1:] == model.image.source.features.shape


@pytest.mark.parametrize(
    ("stem", "patch", "told"),
    [("conv", 3, "halves"), ("conv", 1, "halves"), ("conv", 5, "do not tile"), ("x", 4, "no stem")],
)
def test_a_stem_that_cannot_be(stem, patch, told):
    with pytest.raises(UserError, match=told):
        build("models.image_text:image_text", size=12, patch=patch, stem=stem, width=16, heads=2)


def sounds_and_motions():
    torch.manual_seed(0)
    return build("small_models:sounds_and_motions")


def test_padding_of_a_series_changes_nothing():
    model = sounds_and_motions().eval()
    batch = batch_of(model, 5)
    for name, reach in (("audio", 0), ("watch", 2 * (KERNEL // 2))):  # convolutions look into the padding
        batch[f"{name}_mask"][:] = torch.tensor([1.0, 1.0, 0.0, 0.0])
        before = model(batch)
        batch[name][:, 6 + reach :] += 1
        assert torch.equal(model(batch), before)
        batch[name][:, :6] += 1
        assert not torch.equal(model(batch), before)


def test_a_token_of_patches_is_a_moment_of_all_channels():
    stem = sounds_and_motions().audio.stem
    series = torch.randn((2, 12, 5), generator=torch.Generator().manual_seed(0))
    before = stem(series)
    series[:, 7, 3] += 1
    assert (stem(series) != before).any(dim=2).any(dim=0).tolist() == [False, False, True, False]


@pytest.mark.parametrize("patch", [1, 2, 3, 4, 5, 6, 8, 12])
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_a_series_has_a_token_a_patch(stem, patch):
    encoder = series_encoder(
        length=120, channels=3, patch=patch, width=8, heads=2, blocks=1, stem=stem, masked=False
    )
    features = encoder.stem(torch.randn((2, 120, 3)))
    assert features.shape == (2, 120 // patch, 8)
    assert features.shape[1:] == encoder.source.features.shape


def test_a_token_of_convolutions_is_centred_on_its_patch():
    encoder = series_encoder(length=40, channels=2, patch=4, width=8, heads=2, blocks=1, stem="conv")
    series = torch.zeros((1, 40, 2), requires_grad=True)
    encoder.stem(series)[0, 5].sum().backward()
    seen = series.grad[0].abs().sum(dim=1).nonzero().flatten()
    assert seen[0] <= 20
    assert seen[-1] >= 23
    assert abs((seen[0] + seen[-1]) / 2 - 21.5) <= 1


def test_a_sensor_is_normalised_by_its_own_deviation():
    modalities = build("watch", sensors=["wrist", "ankle"], stds=[2.0, 3]).modalities
    assert [modalities[name].options["std"] for name in ("wrist", "ankle")] == [2.0, 3.0]
    assert modalities["wrist"].inputs.keys() == {"wrist"}
    masked = build("watch", masked=True).modalities["gyroscope"].inputs
    assert masked["gyroscope_mask"].shape == (masked["gyroscope"].shape[0] // 5,)


def test_every_option_of_a_preset_is_told():
    options = full_options("watch", classes=3)
    assert (options["task"], options["classes"], options["length"]) == ("classification", 3, 100)
    assert full_options("tiny")["task"] == "contrastive"
    assert options == build("watch", classes=3).builder_options
