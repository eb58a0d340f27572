"""Every example goes to exactly one client, by the seed, as skewed as alpha says."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.data.division import Division
from lamina.data.partition import MIN_EXAMPLES, Indices, by_group, dirichlet, iid, set_aside
from wire.errors import UserError

SEEDS = st.integers(0, 2**32 - 1)
ALPHAS = st.floats(1e-3, 1e3)
LABELS = st.lists(st.sampled_from("abcd"), min_size=60, max_size=300)
CLIENTS = st.integers(1, 6)


def everyone_once(parts: list[Indices], num_examples: int) -> bool:
    return np.array_equal(np.sort(np.concatenate(parts)), np.arange(num_examples))


def same(left: list[Indices], right: list[Indices]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@given(LABELS, st.floats(0, 0.99), st.integers(0, 2**31 - 1))
def test_a_share_of_each_label_is_set_aside(labels: list[str], share: float, seed: int) -> None:
    public, private = set_aside(labels, share, seed)
    assert sorted(public + private) == list(range(len(labels)))
    assert (public, private) == (sorted(public), sorted(private))
    for label in set(labels):
        assert [labels[index] for index in public].count(label) == round(share * labels.count(label))
    assert set_aside(labels, share, seed) == (public, private)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_public_share_out_of_range(share: float) -> None:
    with pytest.raises(UserError, match="a public share of"):
        Division(4, "iid", public=share)


@given(st.integers(60, 500), CLIENTS, SEEDS)
def test_iid(num_examples: int, clients: int, seed: int) -> None:
    parts = iid(num_examples, clients, np.random.default_rng(seed))
    assert len(parts) == clients
    assert everyone_once(parts, num_examples)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert same(parts, iid(num_examples, clients, np.random.default_rng(seed)))


@given(LABELS, CLIENTS, ALPHAS, SEEDS)
@settings(deadline=None)
def test_dirichlet(labels: list[str], clients: int, alpha: float, seed: int) -> None:
    parts = dirichlet(labels, clients, alpha, np.random.default_rng(seed))
    assert len(parts) == clients
    assert everyone_once(parts, len(labels))
    assert min(map(len, parts)) >= MIN_EXAMPLES
    assert all((np.diff(part) > 0).all() and part.dtype == np.int64 for part in parts)
    assert same(parts, dirichlet(labels, clients, alpha, np.random.default_rng(seed)))


@given(LABELS, st.integers(2, 5), ALPHAS, SEEDS)
@settings(deadline=None)
def test_by_group(labels: list[str], clients: int, alpha: float, seed: int) -> None:
    groups = ["x" if place < 2 * len(labels) // 3 else "y" for place in range(len(labels))]
    sizes = {"x": groups.count("x"), "y": groups.count("y")}
    rng = np.random.default_rng(seed)
    if sizes["y"] < clients // 2 * MIN_EXAMPLES:
        with pytest.raises(UserError, match="too few"):
            by_group(groups, labels, clients, alpha, rng)
        return
    parts = by_group(groups, labels, clients, alpha, rng)
    assert [name for name, _ in parts] == ["x"] * ((clients + 1) // 2) + ["y"] * (clients // 2)
    assert everyone_once([indices for _, indices in parts], len(labels))
    assert all({groups[index] for index in indices} == {name} for name, indices in parts)


def largest_share(alpha: float) -> float:
    """The mean over clients of the part of its examples that has its commonest label."""
    labels = [str(place % 8) for place in range(4000)]
    parts = dirichlet(labels, 8, alpha, np.random.default_rng(1))
    of_label = np.array(labels)
    return float(np.mean([np.unique(of_label[p], return_counts=True)[1].max() / len(p) for p in parts]))


def test_a_small_alpha_is_skewed_and_a_large_one_is_not() -> None:
    shares = [largest_share(alpha) for alpha in (0.05, 0.5, 5, 1000)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.6
    assert shares[-1] < 0.15


def test_another_process_deals_the_same() -> None:
    code = (
        "import numpy as np; from lamina.data.partition import dirichlet;"
        "print([p.tolist() for p in dirichlet(list('abcdef') * 30, 4, 0.5, np.random.default_rng(0))])"
    )
    dealt = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(dealt) == 1


def test_seeds_differ() -> None:
    labels = ["a", "b"] * 100
    assert not same(*(dirichlet(labels, 4, 0.5, np.random.default_rng(seed)) for seed in (0, 1)))
    assert not same(*(iid(200, 4, np.random.default_rng(seed)) for seed in (0, 1)))


@pytest.mark.parametrize("alpha", [0, -1, 1e-9, float("nan"), float("inf")])
def test_an_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(UserError, match="alpha"):
        dirichlet(["a"] * 100, 2, alpha, np.random.default_rng(0))


@pytest.mark.parametrize("clients", [0, 11])
def test_clients_out_of_range(clients: int) -> None:
    with pytest.raises(UserError, match=f"{clients} clients"):
        iid(100, clients, np.random.default_rng(0))


def test_fewer_clients_than_groups() -> None:
    with pytest.raises(UserError, match="groups"):
        by_group(["x", "y"] * 50, ["a"] * 100, 1, 0.5, np.random.default_rng(0))
