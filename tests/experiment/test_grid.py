"""The file of an experiment: its rows, their ids, and a line for each thing that can be wrong in it."""

from __future__ import annotations

import math
from pathlib import Path

import click
import pytest

from lamina.data.command import prepare
from lamina.data.emoji_sources import STYLES
from lamina.data.watch import NUM_FOLDS, PEOPLE_IN_FOLD
from lamina.experiment.grid import Experiment, read_experiment
from lamina.experiment.models import check_models
from lamina.experiment.settings import complete, telling
from wire.errors import UserError

BASE = """
seeds = [0, 1]
[base]
clients = 4
rounds = 2
option.width = 64
[[grid]]
name = "methods"
schedule = ["end_to_end", "layerwise"]
compression = ["none", "int8"]
"""


def read(folder: Path, text: str) -> Experiment:
    file = folder / "file.toml"
    file.write_text(text)
    return read_experiment(file)


def test_a_grid_is_the_product_of_its_lists_and_the_seeds(tmp_path):
    experiment = read(tmp_path, BASE)
    assert len(experiment.rows) == 2 * 2 * 2
    found = {
        (row.settings["schedule"], row.settings["compression"], row.settings["seed"])
        for row in experiment.rows.values()
    }
    assert len(found) == 8
    assert all(
        (row.settings["clients"], row.settings["rounds"], row.settings["option.width"]) == (4, 2, 64)
        for row in experiment.rows.values()
    )
    (grid,) = experiment.grids
    assert "methods/schedule=layerwise,compression=int8/s1" in grid.rows
    assert list(grid.rows.values()) == list(experiment.rows)


def test_ids_follow_from_the_settings_alone(tmp_path):
    before = read(tmp_path, BASE)
    more = BASE.replace('["none", "int8"]', '["float16", "int8", "none"]').replace("[0, 1]", "[1, 2, 0]")
    more += '[[grid]]\nname = "more"\nclients = 2\n'
    assert before.rows.keys() < read(tmp_path, more).rows.keys()
    default = BASE.replace("clients = 4", 'clients = 4\nlearning_rate = 0.001\npartition = "natural"')
    assert read(tmp_path, default).rows.keys() == before.rows.keys()
    other = BASE.replace("clients = 4", "clients = 4\nlearning_rate = 0.002")
    assert not read(tmp_path, other).rows.keys() & before.rows.keys()


def test_known_ids_stay_what_they_are(tmp_path):
    """Results on disk are found by them."""
    assert next(iter(read(tmp_path, BASE).rows)) == "end-to-end-s0-35eda22a"


def test_tables_of_one_name_are_one_grid_and_equal_rows_are_one(tmp_path):
    text = BASE + '[[grid]]\nname = "methods"\nserver_momentum = 0.5\n'
    text += '[[grid]]\nname = "again"\nseeds = [0]\nschedule = "layerwise"\n'
    experiment = read(tmp_path, text)
    assert [grid.name for grid in experiment.grids] == ["methods", "again"]
    assert len(experiment.grids[0].rows) == 8 + 2
    assert len(experiment.rows) == 8 + 2
    (again,) = experiment.grids[1].rows.values()
    assert again == experiment.grids[0].rows["methods/schedule=layerwise,compression=none/s0"]


def test_a_list_is_a_value_in_base_and_choices_in_a_grid(tmp_path):
    rows = read(tmp_path, BASE.replace("rounds = 2", "rounds = [1, 2, 3, 4]")).rows.values()
    assert {str(row.settings["rounds"]) for row in rows} == {"[1, 2, 3, 4]"}
    rows = read(tmp_path, BASE.replace("rounds = 2", 'rounds = "auto"')).rows.values()
    assert {row.settings["rounds"] for row in rows} == {"auto"}
    text = BASE.replace('schedule = ["end_to_end", "layerwise"]', "rounds = [[1, 2, 3, 4], 5]")
    rows = read(tmp_path, text).rows.values()
    assert [row.settings["rounds"] for row in rows][::4] == [[1, 2, 3, 4], 5]


def test_what_a_grid_chooses_takes_the_place_of_its_alternative(tmp_path):
    text = BASE.replace('compression = ["none", "int8"]', "total_rounds = 8")
    for row in read(tmp_path, text).rows.values():
        assert (row.settings["total_rounds"], row.settings["rounds"]) == (8, 8)  # 8: its default, unused


def test_what_a_row_has_no_use_for_makes_no_difference(tmp_path):
    text = BASE.replace('["end_to_end", "layerwise"]', '["centralised", "layerwise"]')
    assert len(read(tmp_path, text).rows) == 2 + 4  # nothing of a centralised model travels
    text = BASE.replace("compression", "blocks_per_stage").replace('["none", "int8"]', "[1, 2]")
    assert len(read(tmp_path, text).rows) == 2 + 4  # end-to-end has one stage
    text = BASE.replace("compression", "small_client_mb").replace('["none", "int8"]', "[90, 100]")
    assert len(read(tmp_path, text).rows) == 2 * 2  # no client is small
    for partition in ("iid", "natural"):  # natural: each of the four has a style of its own
        alphas = f'[0.1, 1]\npartition = "{partition}"'
        text = BASE.replace("compression", "alpha").replace('["none", "int8"]', alphas)
        assert len(read(tmp_path, text).rows) == 2 + 2
    assert len(read(tmp_path, text.replace("clients = 4", "clients = 8")).rows) == 2 * 4  # two share one


@pytest.mark.parametrize("data_set", ["emoji", "watch"])
def test_as_many_clients_as_usual_have_a_group_each(data_set):
    groups = {"emoji": len(STYLES), "watch": (NUM_FOLDS - 1) * PEOPLE_IN_FOLD}[data_set]
    usual = complete({"data_set": data_set}, 0, "")
    assert (usual["partition"], usual["clients"]) == ("natural", groups)


def test_own_data_is_beside_the_file(tmp_path):
    experiment = read(tmp_path, BASE.replace("clients = 4", 'data = "mine"'))
    for row in experiment.rows.values():
        assert row.settings["data"] == str(tmp_path / "mine")
        assert "data_set" not in row.settings
    here = list(experiment.rows)
    (tmp_path / "elsewhere").mkdir()
    moved = read(tmp_path / "elsewhere", BASE.replace("clients = 4", 'data = "mine"'))
    assert list(moved.rows) == here


def test_the_partition_has_the_rows_seed_unless_told(tmp_path):
    assert complete({}, 3, "")["data_seed"] == 3
    assert complete({"data_seed": 1}, 3, "")["data_seed"] == 1
    assert "data_seed" not in telling(complete({}, 3, ""))


def test_a_data_set_has_a_model_that_goes_with_it():
    assert complete({"data_set": "watch"}, 0, "")["model"] == "watch"
    assert "model" not in telling(complete({"data_set": "watch"}, 0, ""))
    assert complete({"data_set": "watch", "model": "tiny"}, 0, "")["model"] == "tiny"


def test_a_new_data_set_brings_its_settings(tmp_path, monkeypatch):
    @click.command
    @click.option("--clients", type=int, default=3)
    @click.option("--fold", type=click.IntRange(0, 4), default=0)
    @click.option("--seed", default=0)
    @click.option("--out", default="data/new")
    @click.option("--json", is_flag=True)
    def new(**_: object) -> None:
        """Nothing."""

    monkeypatch.setitem(prepare.commands, "new", new)
    settings = complete({"data_set": "new", "fold": 2}, 0, "")
    assert (settings["fold"], settings["clients"]) == (2, 3)
    assert "alpha" not in settings
    with pytest.raises(UserError, match="no setting 'alpha'"):
        complete({"data_set": "new", "alpha": 1.0}, 0, "")


def test_rows_are_chosen_by_id_name_and_pattern(tmp_path):
    experiment = read(tmp_path, BASE)
    first = next(iter(experiment.rows))
    assert list(experiment.chosen([])) == list(experiment.rows)
    assert list(experiment.chosen([first])) == [first]
    assert len(experiment.chosen(["methods"])) == 8
    assert len(experiment.chosen(["methods/*s1"])) == 4
    assert len(experiment.chosen(["layerwise-s0-*", first])) == 3
    name = "methods/schedule=layerwise,compression=int8/s1"
    assert list(experiment.chosen([name])) == [experiment.grids[0].rows[name]]
    with pytest.raises(UserError, match=r"no row of .* is 'method'") as error:
        experiment.chosen(["method"])
    assert error.value.hint == "did you mean methods?"


def over(line: str) -> str:
    return BASE.replace("clients = 4", line)


MISTAKES = [
    (over("cleints = 4"), "no setting 'cleints'", "did you mean clients?"),
    (over("seed = 4"), "no setting 'seed'", "seeds = [0, 1, 2]"),
    (over("widht.option = 4"), "no setting 'widht'", "docs/experiments.md"),
    (over('clients = "4"'), "clients is '4'", "a whole number"),
    (over("clients = 4.0"), "clients is 4.0", "a whole number"),
    (over("clients = 0"), "clients: 0 is not in the range", "a whole number"),
    (over("clients = true"), "clients is True", "a whole number"),
    (over('alpha = "skewed"'), "alpha is 'skewed'", "a number"),
    (over("feature_cache = 1"), "feature_cache is 1", "true or false"),
    (over("alpha = -1.0"), "alpha: -1.0 is not in the range", "a number"),
    (over("learning_rate = nan"), "learning_rate is nan", "finite"),
    (over("missing_modality = 2"), "missing_modality: 2", "a number"),
    (over("min_available_clients = 9"), "min_available_clients is 9, and there are 7", "fewer"),
    (over('partition = "irid"'), "partition cannot be 'irid'", "did you mean iid?"),
    (over('partition = ["iid"]'), "partition is ['iid']", "[[grid]]"),
    (over("fraction_train = 2"), "fraction_train is 2.0", "at most 1"),
    (over('prefix_compression = "int9"'), "prefix_compression cannot be 'int9'", "did you mean int8?"),
    (over('data_set = "emojis"'), "no data set 'emojis'", "did you mean emoji?"),
    (over('data_set = "emoji"\ndata = "mine"'), "both data and data_set", "one of them"),
    (over('data = "mine"\nalpha = 0.5'), "no setting 'alpha'", "docs/experiments.md"),
    (over("client_processes = 1"), "client_processes is 1", "write 2"),
    (over("small_clients = 0.5"), "the share that has little memory", "small_client_mb"),
    (over("total_rounds = 8"), "both rounds and total_rounds", "one of them"),
    (over('rounds2 = "x"'), "no setting 'rounds2'", "did you mean rounds?"),
    (BASE.replace("rounds = 2", 'rounds = [1, "x"]'), "no whole number", "a list of one a stage"),
    (BASE.replace("rounds = 2", "rounds = []"), "no whole number", "a list of one a stage"),
    (BASE.replace("seeds = [0, 1]", "seeds = 2"), "seeds is 2", "[0, 1, 2]"),
    (BASE.replace("seeds = [0, 1]", "sedes = [2]"), "no 'sedes' at the top", "did you mean seeds?"),
    (BASE.replace('name = "methods"', ""), "has the name None", "give each a name"),
    (BASE.replace('name = "methods"', 'name = "a/b"'), "has the name 'a/b'", "give each a name"),
    (BASE.replace('["none", "int8"]', "[]"), "compression has no values", "leave it out"),
    (BASE.replace("layerwise", "layerwide"), "schedule cannot be 'layerwide'", "did you mean layerwise?"),
    (BASE.partition("[[grid]]")[0], "has no [[grid]]", "[[grid]]"),
    ("base = 3\n[[grid]]\nname = 'a'", "base is 3", "[base]"),
    ("[base", "cannot be read", "TOML"),
    (over("option.depth = {a = 1}"), "option.depth is {'a': 1}", "write a number"),
    (over("option.depth = [2026-01-01]"), "option.depth is [datetime", "write a number"),
    (BASE.replace("layerwise", "centralised") + "batch_size = 0\n", "batch_size", "at least 1"),
    (BASE + "seeds = [-1]\n", "seeds is [-1]", "whole numbers"),
]


@pytest.mark.parametrize(("text", "wrong", "hint"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_line_with_a_hint(tmp_path, text, wrong, hint):
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert wrong in str(error.value)
    assert "\n" not in str(error.value)
    assert hint in error.value.hint


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_experiment(tmp_path / "nowhere.toml")


def test_model_options_are_checked_before_anything_runs():
    def row(**given):
        return [complete({name.replace("_", ".", 1): value for name, value in given.items()}, 0, "")]

    check_models(row(option_width=64), "file")
    with pytest.raises(UserError, match="tiny has no option 'widht'") as error:
        check_models(row(option_widht=64), "file")
    assert error.value.hint == "did you mean width?"
    with pytest.raises(UserError, match="no model 'tinny'") as error:
        check_models(row(model="tinny"), "file")
    assert error.value.hint == "did you mean tiny?"
    with pytest.raises(UserError, match="cannot load nowhere:model"):
        check_models(row(model="nowhere:model"), "file")


def test_numbers_are_exact(tmp_path):
    """A float setting is one, however it was written."""
    whole, dotted = (complete({"partition": "dirichlet", "alpha": alpha}, 0, "") for alpha in (1, 1.0))
    assert whole == dotted
    assert math.isclose(whole["alpha"], 1.0)
    assert isinstance(whole["alpha"], float)
