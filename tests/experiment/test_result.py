"""From events to figures, to a file and back, and to a report."""

from __future__ import annotations

import sys

import msgspec
import pytest
from pyarrow import parquet
from results import METRIC, result, round_result

from aggregator.events import ClientCame, RoundClosed, UsageTold
from export.costs import StageCost
from export.flops import flops_by_round
from lamina.experiment.grid import read_experiment
from lamina.experiment.report import tools_are_here, write_report
from lamina.experiment.result import by_stage, read_result, rounds_of, write_result
from lamina.experiment.row import result_of
from lamina.experiment.settings import complete
from wire.errors import UserError
from wire.messages import Hello, RoundKey, Usage

GROUPS = (("ann",), ("bob", "cy"))


def cost(train, prefix, segment):
    return StageCost(1, 0, 0, 0, train, prefix, segment, {}, 0, 0)


COSTS = (cost(100, 0, 0), cost(10, 5, 3), cost(10, 8, 2))
ALIKE = dict.fromkeys(("ann", "bob", "cy"), COSTS)


def hello(client, examples):
    return ClientCame(client, Hello({"image": examples, "text": examples}, "onnx", 1, "0"))


def used(stage, number, client, mb=1, cpu_s=1.0, peak_mb=50, opened_s=0.0):
    key = RoundKey(stage, number)
    usage = Usage(key, mb * 10**6, 2 * mb * 10**6, peak_mb * 10**6, 9.0, opened_s, cpu_s)
    return UsageTold(client, usage)


def closed(stage, number, metric=0.5):
    return RoundClosed(RoundKey(stage, number), ("ann",), (), 1.0, {METRIC: metric}, 2.0)


EVENTS = [
    hello("ann", 10),
    hello("bob", 20),
    hello("cy", 30),
    used(0, 0, "ann"),
    used(0, 0, "bob", cpu_s=4.0, peak_mb=900),
    closed(0, 0, 0.1),
    used(0, 0, "cy", cpu_s=5.0, peak_mb=900),  # after the round, as it may come
    used(1, 0, "ann", mb=2, peak_mb=70),
    used(1, 0, "ann", mb=2, peak_mb=70),  # told twice
    used(1, 0, "cy", cpu_s=1.0),
    closed(1, 0, 0.2),
    used(2, 0, "ann", peak_mb=60),
    used(2, 0, "ann", peak_mb=60, opened_s=1.0),  # offered for longer: asked twice
    used(2, 0, "bob"),
    closed(2, 0, 0.3),
]
SETTINGS = complete({"local_epochs": 2}, 0, "")


def test_figures_are_sums_so_far_and_means_of_all_clients():
    rounds = rounds_of(EVENTS, GROUPS, ALIKE, SETTINGS)
    assert [one.round for one in rounds] == [1, 2, 3]
    assert [one.stage for one in rounds] == [1, 2, 3]
    assert [one.metrics[METRIC] for one in rounds] == [0.1, 0.2, 0.3]
    assert [one.bytes_sent for one in rounds] == pytest.approx([1e6, 2e6, 3e6])
    assert [one.bytes_received for one in rounds] == pytest.approx([2e6, 4e6, 6e6])
    assert [one.seconds for one in rounds] == pytest.approx([2, 4, 6])


def test_clients_that_are_left_out_count_with_nothing():
    whole, part = (rounds_of(EVENTS, GROUPS, ALIKE, SETTINGS, left_out)[-1] for left_out in (0, 3))
    for name in ("bytes_sent", "bytes_received", "flops", "cpu_s"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name) / 2), name
    assert part.peak_memory_mb == whole.peak_memory_mb


def test_memory_is_the_first_clients_only():
    rounds = rounds_of(EVENTS, GROUPS, ALIKE, SETTINGS)
    assert [one.peak_memory_mb for one in rounds] == [50, 70, 70]
    assert by_stage(rounds) == (50, 70, 70)


def test_processor_time_of_a_shared_process_counts_once():
    rounds = rounds_of(EVENTS, GROUPS, ALIKE, SETTINGS)
    # ann 1, 2, 4; the others' process: bob has told 4, cy 5, then 6
    assert [one.cpu_s for one in rounds] == pytest.approx([6 / 3, 8 / 3, 10 / 3])
    alone = rounds_of(EVENTS, (("ann",), ("bob",), ("cy",)), ALIKE, SETTINGS)
    assert alone[0].cpu_s == pytest.approx(10 / 3)


def test_flops_are_of_what_each_client_trained():
    rounds = rounds_of(EVENTS, GROUPS, ALIKE, SETTINGS)
    first = 2 * 100 * (10 + 20 + 30)
    second = first + (2 * 10 + 3) * (10 + 30)
    third = second + (2 * 10 + 2) * 10 + (2 * 10 + 3 + 2) * 20  # bob catches up on a segment
    assert [one.flops for one in rounds] == pytest.approx([first / 3, second / 3, third / 3])


def test_a_client_that_lacks_a_modality_computes_less():
    costs = ALIKE | {"ann": (cost(60, 0, 0), cost(6, 2, 2), cost(6, 4, 1))}
    rounds = rounds_of(EVENTS, GROUPS, costs, SETTINGS)
    assert rounds[0].flops == pytest.approx((2 * 60 * 10 + 2 * 100 * (20 + 30)) / 3)


def test_flops_without_a_cache_have_the_prefix_in_each_step():
    found = flops_by_round(COSTS, [0, 1, 1, 2], 10, 3, cached=False)
    assert [one.prefix for one in found] == [0, 150, 150, 240]
    assert [one.cache for one in found] == [0, 0, 0, 0]
    cached = flops_by_round(COSTS, [0, 1, 1, 2], 10, 3, cached=True, views=2)
    assert [one.cache for one in cached] == [0, 60, 0, 40]
    assert [one.total for one in cached] == [3000, 360, 300, 340]


def test_a_result_comes_back_as_it_was(tmp_path):
    one = result("a", 1, [round_result(1, 0.25), round_result(2, 0.5, peak_memory_mb=None)], alpha=0.1)
    write_result(tmp_path / "result.json", one)
    assert read_result(tmp_path / "result.json") == one
    assert read_result(tmp_path / "other.json") is None
    older = {name: value for name, value in one.settings.items() if name not in ("alignment", "public")}
    write_result(tmp_path / "result.json", msgspec.structs.replace(one, settings=older))
    assert read_result(tmp_path / "result.json") == one  # what was added since is at its default
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        read_result(tmp_path / "result.json")


def test_a_row_of_other_data_is_not_taken_for_done(tmp_path):
    """Two files beside data of one name have rows of the same ids."""
    text = "base.data = 'mine'\n[[grid]]\nname = 'one'\nschedule = 'layerwise'\n"
    rows = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "file.toml").write_text(text)
        rows += read_experiment(tmp_path / place / "file.toml").rows.values()
    here, there = rows
    assert here.id == there.id
    path = tmp_path / "rows" / here.id / "result.json"
    path.parent.mkdir(parents=True)
    write_result(path, result(here.id, 0, [round_result(1, 0.5)], data=here.settings["data"]))
    assert result_of(tmp_path, here) is not None
    with pytest.raises(UserError, match="is of other data"):
        result_of(tmp_path, there)


FILE = """
seeds = [0, 1]
[[grid]]
name = "methods"
schedule = ["end_to_end", "layerwise", "centralised"]
alpha = [0.1, 1.0]
partition = "dirichlet"
[[grid]]
name = "later"
learning_rate = 0.1
"""


def test_the_report(tmp_path):
    (tmp_path / "file.toml").write_text(FILE)
    experiment = read_experiment(tmp_path / "file.toml")
    done = {}
    for row in experiment.rows.values():
        settings = row.settings
        if settings["learning_rate"] != 0.1:
            given = {name: settings[name] for name in ("schedule", "alpha", "partition")}
            each = 2 if settings["schedule"] == "end_to_end" else 1
            reached = 0.01 * settings["seed"] + (0.05 if settings["alpha"] == 1.0 else 0.0)
            cost = {"bytes_sent": each * 1e6, "bytes_received": each * 1e6, "flops": each * 1e12}
            rounds = [
                round_result(
                    number, 0.1 * number + reached, **{name: number * one for name, one in cost.items()}
                )
                for number in range(1, 4)
            ]
            done[row.id] = result(row.id, settings["seed"], rounds, **given)
    page = write_report(experiment, done, tmp_path, " --dir here", tmp_path / "out").read_text()
    assert "12 of 14 rows" in page
    assert "| end-to-end | 0.1 | 2 | 30.5% ± 0.7 | 6.00 ± 0.00 | 6.00 ± 0.00 | 6 ± 0 | 100 ± 0 |" in page
    assert "| layer-wise | 1.0 | 2 | 35.5% ± 0.7 | 3.00 ± 0.00 | 3.00 ± 0.00 | 3 ± 0 | 100 ± 0 |" in page
    assert "| centralised | 1.0 | 2 | 35.5% ± 0.7 | – | – | 3 ± 0 |" in page
    assert "by chance it is 10.0%" in page
    assert "| alpha 0.1 | bytes: 6.00 MB | end-to-end | 15.5% ± 0.7 |" in page
    assert "| alpha 0.1 | FLOPs: 3 TFLOP | layer-wise | 30.5% ± 0.7 |" in page
    assert "| alpha 1.0 | FLOPs: 3 TFLOP | end-to-end | 20.5% ± 0.7 |" in page
    assert "No row is done." in page
    for row in done:
        assert f"lamina experiment {experiment.file} --dir here --only {row} --again" in page
        assert f"lamina evaluate {tmp_path}/rows/{row}/model --data {tmp_path}/data/holdout" in page
    for name in ("methods-1.png", "methods-2.png", "methods-all.png"):
        assert f"({name})" in page
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    rounds = parquet.read_table(tmp_path / "out" / "rounds.parquet")
    rows = parquet.read_table(tmp_path / "out" / "rows.parquet")
    assert (len(rounds), len(rows)) == (36, 12)
    types = {name: str(rounds.schema.field(name).type) for name in rounds.column_names}
    assert types["id"] == types["setting.schedule"] == "string"
    assert types["round"] == "int32"
    assert types["setting.alpha"] == types[f"metric.{METRIC}"] == types["flops"] == "double"
    assert types["setting.clients"] == "int64"
    assert types["setting.feature_cache"] == "bool"
    assert rows["examples"].to_pylist() == [30] * 12
    assert rounds["bytes_sent"].to_pylist()[:3] == [2e6, 4e6, 6e6]
    assert rows["grids"].to_pylist()[0] == ["methods"]


def test_folds_stand_side_by_side_and_pairs_are_compared(tmp_path):
    (tmp_path / "file.toml").write_text("""
        seeds = [0, 1]
        base.data_set = "watch"
        [[grid]]
        name = "methods"
        schedule = ["end_to_end", "layerwise"]
        fold = [0, 3]
    """)
    experiment = read_experiment(tmp_path / "file.toml")
    done = {}
    for row in experiment.rows.values():
        schedule, fold, seed = (row.settings[name] for name in ("schedule", "fold", "seed"))
        reached = 0.1 * fold + 0.02 * seed + (0.5 if schedule == "end_to_end" else 0.48 + 0.02 * seed)
        done[row.id] = result(
            row.id, seed, [round_result(1, reached)], data_set="watch", schedule=schedule, fold=fold
        )
    page = write_report(experiment, done, tmp_path, "", tmp_path / "out").read_text()
    assert "| method | fold 0 | fold 3 | points above the first |" in page
    assert "| end-to-end | 51.0% ± 1.4 | 81.0% ± 1.4 | – |" in page
    assert "| layer-wise | 50.0% ± 2.8 | 80.0% ± 2.8 | -1.0 ± 1.2 |" in page


def test_repeats_of_one_seed_count_each(tmp_path):
    (tmp_path / "file.toml").write_text("""
        base.data_set = "watch"
        [[grid]]
        name = "methods"
        schedule = ["end_to_end", "layerwise"]
        fold = [0, 1]
        data_seed = [0, 1]
    """)
    experiment = read_experiment(tmp_path / "file.toml")
    done = {}
    for row in experiment.rows.values():
        given = {name: row.settings[name] for name in ("data_set", "schedule", "fold", "data_seed")}
        cost = 1e6 * (1 + given["data_seed"])  # one round each, so no curve meets another
        one = round_result(1, 0.2 + 0.6 * given["data_seed"], bytes_sent=cost)
        done[row.id] = result(row.id, 0, [one], **given)
    page = write_report(experiment, done, tmp_path, "", tmp_path / "out").read_text()
    assert "| end-to-end | 50.0% ± 42.4 | 50.0% ± 42.4 | – |" in page


@pytest.mark.parametrize("package", ["pyarrow", "matplotlib"])
def test_a_missing_package_is_one_line(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs? {package}") as error:
        tools_are_here()
    assert error.value.hint == 'pip install "lamina[experiment]"'
