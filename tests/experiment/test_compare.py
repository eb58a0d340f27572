"""Interpolation, equal budgets, and which results belong together."""

from __future__ import annotations

import numpy as np
import pytest
from results import METRIC, result, round_result

from lamina.experiment.compare import at_equal, band, problems, traffic, value_at
from lamina.experiment.pictures import OTHERS, colours_of


def curve(*points):
    xs, ys = zip(*points, strict=True)
    return np.array(xs, float), np.array(ys, float)


def test_a_value_between_two_points_is_on_the_line():
    xs, ys = curve((1, 0.1), (3, 0.5), (4, 0.4))
    assert value_at(xs, ys, 2) == pytest.approx(0.3)
    assert value_at(xs, ys, 3.5) == pytest.approx(0.45)
    assert value_at(xs, ys, 1) == pytest.approx(0.1)
    assert value_at(xs, ys, 4) == pytest.approx(0.4)


def test_there_is_no_value_where_the_curve_is_not():
    xs, ys = curve((1, 0.1), (3, 0.5))
    assert value_at(xs, ys, 0.9) is None
    assert value_at(xs, ys, 3.1) is None


def test_a_band_is_where_all_curves_are():
    x, mean, least, most = band([curve((0, 0), (4, 4)), curve((1, 3), (3, 5))])
    assert x.tolist() == [1, 3]
    assert mean.tolist() == [2, 4]
    assert least.tolist() == [1, 3]
    assert most.tolist() == [3, 5]


def test_curves_that_share_no_x_are_a_point():
    x, mean, least, most = band([curve((1, 0.2)), curve((3, 0.4))])
    assert (x.tolist(), least.tolist(), most.tolist()) == ([2], [0.2], [0.4])
    assert mean.tolist() == pytest.approx([0.3])


def rows(schedule, metrics, each=1.0, seeds=(0,), **settings):
    """Results whose rounds cost `each` MB up and down and TFLOP."""
    found = []
    for seed in seeds:
        rounds = [
            round_result(
                number,
                metric + 0.1 * seed,
                bytes_sent=each * 1e6 * number,
                bytes_received=each * 1e6 * number,
                flops=each * 1e12 * number,
            )
            for number, metric in enumerate(metrics, 1)
        ]
        found.append(result(f"{schedule}-{seed}", seed, rounds, schedule=schedule, **settings))
    return found


def test_methods_are_compared_at_the_smallest_total_of_any():
    (problem,) = problems(
        [
            *rows("end_to_end", [0.1, 0.2, 0.4], each=2.0, seeds=(0, 1)),
            *rows("layerwise", [0.1, 0.3, 0.5], each=1.0, seeds=(0, 1)),
            *rows("centralised", [0.9], each=0.1),
        ]
    )
    budget, reached = at_equal(problem, traffic, METRIC)
    assert budget == pytest.approx(6e6)
    assert reached["layer-wise"] == pytest.approx([0.5, 0.6])
    assert reached["end-to-end"] == pytest.approx([0.15, 0.25])
    assert "centralised" not in reached


def test_a_method_without_a_round_within_the_budget_has_none():
    (problem,) = problems([*rows("end_to_end", [0.1], each=5.0), *rows("layerwise", [0.1, 0.2], each=1.0)])
    _, reached = at_equal(problem, traffic, METRIC)
    assert reached["end-to-end"] == []
    assert at_equal(problems(rows("layerwise", [0.1]))[0], traffic, METRIC) is None


def test_seeds_are_repeats_and_data_is_the_problem():
    skewed = {"partition": "dirichlet", "alpha": 0.1}
    found = problems(
        [
            *rows("end_to_end", [0.1], seeds=(0, 1), **skewed),
            *rows("layerwise", [0.1], seeds=(0, 1), **skewed),
            *rows("layerwise", [0.1], seeds=(0, 1), compression="int8", **skewed),
            *rows("layerwise", [0.1], seeds=(0, 1), **skewed | {"alpha": 1.0}),
        ]
    )
    assert [problem.label for problem in found] == ["alpha 0.1", "alpha 1.0"]
    labels = [[method.label for method in problem.methods] for problem in found]
    assert labels == [["end-to-end", "layer-wise", "layer-wise, compression int8"], ["layer-wise"]]
    assert all(len(method.results) == 2 for problem in found for method in problem.methods)


def test_what_a_method_has_no_use_for_does_not_set_it_apart():
    (problem,) = problems(
        [
            *rows("end_to_end", [0.1], feature_dtype="float32", client_processes=2),
            *rows("layerwise", [0.1], feature_dtype="float32", client_processes=2),
            *rows("centralised", [0.1], feature_dtype="float32", client_processes=2),
        ]
    )
    assert [method.label for method in problem.methods] == ["end-to-end", "layer-wise", "centralised"]


def test_rounds_set_apart_where_they_differ():
    (problem,) = problems(
        [
            *rows("end_to_end", [0.1], total_rounds=32),
            *rows("layerwise", [0.1], total_rounds=32, seeds=(0, 1)),
            *rows("layerwise", [0.1], rounds=[14, 6, 6, 6]),
            *rows("layerwise", [0.1], total_rounds=112),
        ]
    )
    labels = ["end-to-end", "layer-wise", "layer-wise, rounds 14-6-6-6", "layer-wise, total_rounds 112"]
    assert [method.label for method in problem.methods] == labels


@pytest.mark.parametrize(
    "setting", [{"min_available_clients": 2}, {"option.width": 64}, {"total_rounds": 32}]
)
def test_methods_are_apart_in_whatever_order(setting):
    """One with a setting that has no default, one without: whichever comes first."""
    ((name, value),) = setting.items()
    told = f"layer-wise, {name.removeprefix('option.')} {value}"
    both = [*rows("layerwise", [0.9]), *rows("layerwise", [0.1], **setting)]
    (problem,) = problems(both)
    assert [method.label for method in problem.methods] == ["layer-wise", told]
    (problem,) = problems(both[::-1])
    first, second = problem.methods
    assert first.label.startswith(told)
    assert second.label != first.label
    assert [method.results[0].last.metrics[METRIC] for method in problem.methods] == [0.1, 0.9]
    assert [len(method.results) for method in problem.methods] == [1, 1]


def test_colours_differ_and_stay():
    labels = ["layer-wise", "layer-wise, int8", "end-to-end", "a", "b"]
    found = colours_of(labels)
    assert len(set(found.values())) == len(labels)
    assert colours_of(["end-to-end"])["end-to-end"] == found["end-to-end"]
    many = list(colours_of([str(number) for number in range(30)]).values())
    assert len(set(many[: len(OTHERS)])) == len(OTHERS)
