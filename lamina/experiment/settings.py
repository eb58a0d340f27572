"""What a row of an experiment can set, and whether a value may be one.

Rules: a setting is an option of a command that a row runs, by the option's name with underscores: those of
`lamina data prepare SET`, of the model and its export, of `aggregator.plan.RunPlan`, of a client; and a few
of our own. `option.NAME` is an option of the model's builder, `column.NAME` a table's column. A value has
the setting's type: no text that looks like a number. Whatever is wrong is one `UserError`, with a hint.

Next: `lamina/experiment/grid.py`, which makes rows of them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import click

from aggregator.plan import RunPlan
from lamina.data.sets import DATA_SETS
from lamina.options import column_option, engine_option, feature_options, model_options, plan_options
from wire.errors import UserError

CENTRALISED = "centralised"
SCHEDULES = ("layerwise", "progressive", "end_to_end", CENTRALISED)
TABLES = ("option", "column")
ELSEWHERE = {"seed": "write seeds = [0, 1, 2] at the top", "out": "--dir says where all goes"}
"""Names that a person may expect here, and what to do."""

_OF_DATA = ("out", "json", "seed")  # of `lamina data prepare`, which we choose
_MANY = 2**20  # clients, where they are not known yet
_ALONE = (
    *("fraction_train", "min_available_clients", "min_updates", "over_selection", "buffer_size"),
    *("max_staleness", "compression", "prefix_compression", "proximal_mu", "aggregation"),
    *("malicious_fraction", "max_update_norm", "max_examples", "server_optimizer", "server_learning_rate"),
    *("server_momentum", "server_beta_2", "server_tau", "client_processes"),
    *("small_clients", "small_client_mb", "alignment", "drop_incomplete"),
)
"""What is about several clients and what travels: a centralised row has none of it."""

Values = dict[str, Any]


class Numbers(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks only
    """A whole number, or a list of them, one a stage; or one of some words."""

    name = "integer or list"

    def __init__(self, *words: str) -> None:
        self.words = words
        self.expected = ", ".join([*words, "a whole number, or a list of one a stage"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As it is. Fails for anything else."""
        if value in self.words:
            return value
        each = value if isinstance(value, list) and value else [value]
        if not all(type(one) is int and one >= 0 for one in each):
            self.fail(f"{value!r} is no whole number, nor a list of one a stage", param, ctx)
        return value


@click.command
@model_options
@click.option(
    "--total-rounds", type=click.IntRange(min=1), help="Of all stages together, in place of rounds."
)
@click.option("--blocks-per-stage", type=click.IntRange(min=1), default=1)
@click.option("--micro-batch-size", type=Numbers(), default=0)
@click.option("--weight-decay", type=click.FloatRange(0), default=0.01)
@engine_option()
@click.option("--threads", type=click.IntRange(min=1), default=1, help="Of each client.")
@feature_options
@click.option("--feature-cache/--no-feature-cache", default=True, help="Else the prefix runs in each step.")
@column_option
@plan_options(rounds=8, min_available_clients=None, round_deadline_s=3600.0)
@click.option("--data-set", default="emoji", help="Of `lamina data prepare`.")
@click.option("--data", type=str, help="A folder of your own in place of data_set.")
@click.option(
    "--data-seed", type=click.IntRange(min=0), help="Of the partition.  [default: the row's seed]"
)
@click.option("--calibration/--no-calibration", default=False, help="On the data set's public examples.")
@click.option(
    "--drop-incomplete/--keep-incomplete",
    default=False,
    help="Whether clients that lack a modality are left out.",
)
@click.option(
    "--small-clients", type=click.FloatRange(0, 1), default=0.0, help="Share that has little memory."
)
@click.option("--small-client-mb", type=click.IntRange(min=1), help="What these may use, 10^6 bytes.")
@click.option("--client-processes", type=click.IntRange(min=0), default=0, help="0: one for each client.")
def _row(**_values: Any) -> None:
    """Every setting but those of a data set."""


def _named(command: click.Command, left_out: Iterable[str]) -> dict[str, click.Option]:
    named = {
        max(option.opts, key=len).lstrip("-").replace("-", "_"): option
        for option in command.params
        if isinstance(option, click.Option)
    }
    return {name: option for name, option in named.items() if name not in left_out}


def _defaults(command: click.Command, options: Mapping[str, click.Option]) -> Values:
    parsed = command.make_context("", []).params
    return {name: parsed[str(option.name)] for name, option in options.items()}


OWN = _named(_row, (*TABLES, "seed", "max_feature_mb"))
"""Name -> option, without those of a data set."""
OWN |= {
    "schedule": click.Option(["--schedule"], type=click.Choice(SCHEDULES)),
    "rounds": click.Option(["--rounds"], type=Numbers("auto")),
}

DEFAULTS = _defaults(_row, OWN)
PLAN = tuple(name for name in RunPlan.__struct_fields__ if name in OWN and name != "rounds")
"""Settings that the aggregator is started with as they are."""


def data_settings(data_set: str, where: str) -> tuple[dict[str, click.Option], Values]:
    """The options of `lamina data prepare SET`, and defaults: theirs, and the model that goes with it.

    Raises `UserError` where there is no such data set.
    """
    from lamina.data.command import prepare

    command = prepare.commands.get(data_set)
    if command is None:
        raise UserError(
            f"{where}: there is no data set {data_set!r}", did_you_mean(data_set, prepare.commands)
        )
    options = _named(command, _OF_DATA)
    model = {"model": DATA_SETS[data_set].model} if data_set in DATA_SETS else {}
    return options, _defaults(command, options) | model


def flat(table: Mapping[str, Any]) -> Values:
    """Settings by name: `option.width = 64` in TOML is the setting `option.width`."""
    found: Values = {}
    for name, value in table.items():
        if name in TABLES and isinstance(value, dict):
            found |= {f"{name}.{key}": one for key, one in value.items()}
        else:
            found[name] = value
    return found


def complete(given: Values, seed: int, where: str) -> Values:
    """All settings of a row, defaults included. where: to begin an error with.

    What a row has no use for is at its default, whatever `given` says: rows that do the same are equal.
    Raises `UserError`.
    """
    known, defaults = OWN, DEFAULTS
    if "data" in given:
        if clash := [name for name in ("data_set", "data_seed") if name in given]:
            raise UserError(f"{where}: both data and {clash[0]} say what is trained on", "give one of them")
    else:
        name = _checked(OWN["data_set"], given.get("data_set", DEFAULTS["data_set"]), where, "data_set")
        options, of_data = data_settings(name, where)
        known, defaults = OWN | options, DEFAULTS | of_data | {"data_seed": seed}
    values = dict(defaults)
    for name, value in given.items():
        if name.partition(".")[0] in TABLES and "." in name:
            values[name] = _checked_entry(name, value, where)
        elif name in known:
            values[name] = _checked(known[name], value, where, name)
        else:
            of_all = [*known, *(f"{table}.NAME" for table in TABLES)]
            hint = ELSEWHERE.get(name) or did_you_mean(name, of_all, "docs/experiments.md lists them")
            raise UserError(f"{where}: there is no setting {name!r}", hint)
    for name in ("data_set", "data_seed") if "data" in given else ("data",):
        del values[name]
    values |= {name: defaults[name] for name in idle(values)} | {"seed": seed}
    _check_together(values, given, where)
    return values


def telling(values: Values) -> Values:
    """Of a row's settings those that are not at their default, sorted by name, with what it trains on."""
    defaults = _defaults_of(values)
    kept = ("data_set", "schedule", "seed")
    return {
        name: values[name]
        for name in sorted(values)
        if name in kept or name not in defaults or values[name] != defaults[name]
    }


def up_to_date(values: Values) -> Values:
    """All settings of a row that was run before some of them were there: these are at their defaults."""
    return _defaults_of(values) | values


def _defaults_of(values: Values) -> Values:
    """Of the settings that there are for the row's own data, or for its data set."""
    defaults, unused = DEFAULTS, {"data_set", "data_seed"}
    if "data_set" in values:
        defaults = DEFAULTS | data_settings(values["data_set"], "")[1] | {"data_seed": values["seed"]}
        unused = {"data"}
    return {name: value for name, value in defaults.items() if name not in unused}


def idle(values: Values) -> list[str]:
    """Settings that a row has no use for, whatever they are."""
    found: list[str] = []
    if values["schedule"] != "layerwise":
        found += ["feature_cache", "feature_dtype"]
    if values["schedule"] in ("end_to_end", CENTRALISED):
        found += ["blocks_per_stage", "warm_start"]
    if values["schedule"] == CENTRALISED:
        found += _ALONE
    if values["total_rounds"] is not None:
        found.append("rounds")
    if values.get("missing_modality") == 0:
        found.append("drop_incomplete")
    if not values["small_clients"]:
        found.append("small_client_mb")
    if "alpha" in values and _draws_no_proportions(values):
        found.append("alpha")
    return found


def _draws_no_proportions(values: Values) -> bool:
    """Whether nothing is dealt by Dir(alpha): a data set has a group for each of its usual clients."""
    usual = data_settings(values["data_set"], "")[1].get("clients", 0)
    partition = values.get("partition")
    return partition == "iid" or (partition == "natural" and values["clients"] <= usual)


def _check_together(values: Values, given: Values, where: str) -> None:
    if {"rounds", "total_rounds"} <= given.keys():
        raise UserError(f"{where}: both rounds and total_rounds say how long it goes", "give one of them")
    if values["client_processes"] == 1:
        raise UserError(
            f"{where}: client_processes is 1, and the first client has a process of its own",
            "write 2 for all others in one process, or 0 for one each",
        )
    if values["small_clients"] and values["small_client_mb"] is None:
        raise UserError(
            f"{where}: small_clients is the share that has little memory", "say how much: small_client_mb"
        )
    clients = values.get("clients") or _MANY
    least = values["min_available_clients"] or clients
    if least > clients:
        raise UserError(
            f"{where}: min_available_clients is {least}, and there are {clients} clients", "wait for fewer"
        )
    plan = {name: values[name] for name in PLAN}
    plan |= {"min_available_clients": least, "seed": values["seed"]}
    try:
        RunPlan(**plan)
    except UserError as error:
        raise UserError(f"{where}: {error}", error.hint) from None


def _checked(option: click.Option, value: Any, where: str, name: str) -> Any:
    """The value, a whole number as a float where the setting is one."""
    types, words = _expected(option)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        more = "; a list of choices belongs into a [[grid]]" if isinstance(value, list) else ""
        raise UserError(f"{where}: {name} is {value!r}", f"write {words}{more}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {name} is {value}", "write a number that is finite")
    try:
        return value if option.is_flag else option.type.convert(value, option, None)
    except click.BadParameter as error:
        if isinstance(option.type, click.Choice):
            hint = did_you_mean(str(value), map(str, option.type.choices))
            raise UserError(f"{where}: {name} cannot be {value!r}", hint) from None
        raise UserError(f"{where}: {name}: {error.message.rstrip('.')}", f"write {words}") from None


def _expected(option: click.Option) -> tuple[tuple[type, ...], str]:
    """The types that a value may have in TOML, and how to say so."""
    kind = option.type
    if option.is_flag:
        return (bool,), "true or false"
    if isinstance(kind, Numbers):
        return (int, list, str) if kind.words else (int, list), kind.expected
    if isinstance(kind, click.types.IntParamType):
        return (int,), "a whole number"
    if isinstance(kind, click.types.FloatParamType):
        return (int, float), "a number"
    if isinstance(kind, click.Choice):
        return (str,), f"one of {', '.join(map(str, kind.choices))}"
    return (str,), "a text"


def _checked_entry(name: str, value: Any, where: str) -> Any:
    if name.startswith("column.") and not isinstance(value, str):
        raise UserError(f"{where}: {name} is {value!r}", "write the column's name, a text")
    each = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int | float | bool) for one in each):
        raise UserError(f"{where}: {name} is {value!r}", "write a number, a text, true or false, or a list")
    return value


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A hint: the name that is nearest, else all, or what else to do."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else otherwise or f"choose one of {', '.join(names)}"
