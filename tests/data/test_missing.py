"""Who lacks a modality: the same clients for a seed, more of them for more, each modality as often."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.data.division import Division
from lamina.data.folder import Row
from lamina.data.missing import lacking
from wire.errors import UserError

CLIENTS = [f"client-{place}" for place in range(20)]
SHARES = st.floats(0, 1)
SEEDS = st.integers(0, 2**31)


@given(SHARES, SEEDS, st.integers(2, 3))
def test_a_share_of_the_clients_lacks_each_modality_as_often(share: float, seed: int, number: int) -> None:
    modalities = ["image", "audio", "text"][:number]
    found = lacking(CLIENTS, modalities, share, seed)
    assert abs(len(found) - share * len(CLIENTS)) <= 0.5
    assert set(found) <= set(CLIENTS)
    counts = Counter(dict.fromkeys(modalities, 0)) + Counter(found.values())
    often = [counts[modality] for modality in modalities]
    assert max(often) - min(often) <= 1
    assert found == lacking(CLIENTS, modalities, share, seed)


@given(SHARES, SHARES, SEEDS)
def test_more_is_the_same_clients_and_others(one: float, other: float, seed: int) -> None:
    few, many = (lacking(CLIENTS, ["image", "text"], share, seed) for share in sorted((one, other)))
    assert few.items() <= many.items()


def test_the_extremes() -> None:
    assert lacking(CLIENTS, ["image", "text"], 0, 0) == {}
    assert lacking(CLIENTS, ["image", "text"], 1, 0).keys() == set(CLIENTS)


def test_seeds_draw_other_clients_and_other_modalities() -> None:
    drawn = [lacking(CLIENTS, ["image", "text"], 0.25, seed) for seed in range(20)]
    assert len({tuple(sorted(one)) for one in drawn}) > 10
    single = {next(iter(lacking(["a"], ["image", "text"], 1, seed).values())) for seed in range(20)}
    assert single == {"image", "text"}


@pytest.mark.parametrize("share", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_share_that_is_none(share: float) -> None:
    with pytest.raises(UserError, match="share"):
        Division(4, "iid", missing_modality=share)


def test_nothing_missing_is_no_argument() -> None:
    assert "missing_modality" not in Division(4, "iid").arguments
    assert Division(4, "iid", missing_modality=0.5).arguments["missing_modality"] == 0.5


def test_an_example_without_a_modality(tmp_path: Path) -> None:
    row = Row({"image": "a.png", "text": "a fox", "label": "x"}, {"a.png": b"1"})
    assert row.without("image") == Row({"image": "", "text": "a fox", "label": "x"}, {})
    assert row.without("text") == Row({"image": "a.png", "text": "", "label": "x"}, {"a.png": b"1"})
