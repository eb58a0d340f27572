"""The emoji data set, from a registry of two tiny styles: what leaks, what is written, what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tiny_registry import PLACE, calls

from inputs.dataset import Dataset
from lamina.data.command import command
from lamina.data.division import Division
from lamina.data.emoji import family, prepare_emoji
from lamina.data.emoji_sources import Concept
from lamina.data.folder import Prepared
from wire.errors import UserError
from wire.manifest import Modality, TensorSpec

SIZE = 8


def prepare(out: Path, clients: int = 2, partition: str = "natural", seed: int = 0) -> Prepared:
    return prepare_emoji(out, Division(clients, partition, seed=seed), SIZE)  # type: ignore[arg-type]


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def concept(row: dict[str, str]) -> str:
    return row["text"].partition(":")[0]


def trained_on(prepared: Prepared) -> list[dict[str, str]]:
    return [row for client in prepared.inventory.clients for row in read(prepared.client(client))]


@pytest.fixture
def out(registry: Path, tmp_path: Path) -> Path:
    return tmp_path / "emoji"


def test_a_natural_client_has_one_style(out: Path) -> None:
    prepared = prepare(out)
    assert list(prepared.inventory.clients) == ["square", "round"]
    for client, count in prepared.inventory.clients.items():
        rows = read(prepared.client(client))
        assert {row["group"] for row in rows} == {client}
        assert len(rows) == count
        assert all((prepared.client(client) / row["image"]).is_file() for row in rows)


def test_rows_are_what_the_sources_say(out: Path) -> None:
    prepared = prepare(out)
    for row in read(prepared.client("round")):
        place = PLACE[concept(row)]
        if place == 7:
            continue  # drawn in the colour of the next
        assert row["text"] == f"thing {place}: number{place}"
        assert row["label"] == ("faces", "food", "places")[place % 3]
        with Image.open(prepared.client("round") / row["image"]) as image:
            assert image.size == (SIZE, SIZE)
            pixels = image.convert("RGB")
        assert pixels.getpixel((4, 4)) == (place * 2 + 1, 0x40, 255 - place)
        assert min(pixels.getpixel((0, 0))) > place * 2 + 1  # type: ignore[type-var, arg-type]


def test_nobody_trains_on_a_held_out_concept(out: Path) -> None:
    prepared = prepare(out)
    unseen = {concept(row) for row in read(out / "holdout")}
    seen = {concept(row) for row in trained_on(prepared)}
    assert not unseen & seen
    assert 0.1 < len(unseen) / len(unseen | seen) < 0.3
    assert {row["group"] for row in read(out / "holdout")} == {"square", "round"}


def test_held_out_renderings_are_of_concepts_seen_in_another_style(out: Path) -> None:
    seen = {(concept(row), row["group"]) for row in trained_on(prepare(out))}
    renderings = {(concept(row), row["group"]) for row in read(out / "renderings")}
    assert renderings
    assert not renderings & seen
    other = {"square": "round", "round": "square"}
    assert {(name, other[style]) for name, style in renderings} <= seen


def test_identical_and_empty_pictures_and_what_is_no_concept_are_left_out(out: Path) -> None:
    rows = [*trained_on(prepare(out)), *read(out / "holdout"), *read(out / "renderings")]
    drawn = {(concept(row), row["group"]) for row in rows}
    assert len(rows) == len(drawn) == 120 + 100 - 2
    assert not {("thing 8", "round"), ("thing 9", "round")} & drawn
    assert {"a flag", "letter A"}.isdisjoint(concept(row) for row in rows)


def test_partitions_among_as_many_clients_share_their_examples(tmp_path: Path, out: Path) -> None:
    examples = []
    for partition in ("natural", "iid", "dirichlet"):
        prepared = prepare(tmp_path / partition, 4, partition)  # type: ignore[arg-type]
        assert len(prepared.inventory.clients) == 4
        examples.append(sorted((concept(row), row["group"]) for row in trained_on(prepared)))
    assert examples[0] == examples[1] == examples[2]
    assert list(prepared.inventory.clients) == ["client-1", "client-2", "client-3", "client-4"]


def test_more_natural_clients_than_styles(out: Path) -> None:
    prepared = prepare(out, 3)
    assert list(prepared.inventory.clients) == ["square-1", "square-2", "round"]
    assert {row["group"] for row in read(prepared.client("square-2"))} == {"square"}


def test_the_seed_deals_again_and_the_hold_out_stays(tmp_path: Path, out: Path) -> None:
    first, same, other = (
        prepare(tmp_path / name, 4, "iid", s) for name, s in (("a", 3), ("b", 3), ("c", 4))
    )
    table = "clients/client-1/table.csv"
    assert (first.folder / table).read_bytes() == (same.folder / table).read_bytes()
    assert (first.folder / table).read_bytes() != (other.folder / table).read_bytes()
    held_out = [(p.folder / "holdout/table.csv").read_bytes() for p in (first, other)]
    assert held_out[0] == held_out[1]


def test_only_the_styles_in_use_are_fetched(registry: Path, out: Path) -> None:
    prepared = prepare(out, 1, "iid")
    assert sorted(calls(registry)) == ["@icons/square@1.0.0", "names@1.0.0"]
    assert "renderings" not in prepared.inventory.held_out
    assert not (out / "renderings").exists()


def test_the_same_arguments_find_it_ready(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(out)
    monkeypatch.setattr("lamina.data.emoji.fetch", lambda *_: pytest.fail("fetched again"))
    assert prepare(out) == first


def test_another_data_set_is_never_written_over(out: Path) -> None:
    prepare(out)
    with pytest.raises(UserError, match="other arguments"):
        prepare(out, 2, "iid")


def test_a_folder_of_something_else_is_never_touched(out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no prepared data set"):
        prepare(out)
    assert list(out.iterdir()) == [out / "notes.txt"]


def test_an_interrupted_preparation_leaves_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("lamina.data.folder._licenses", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(out)
    assert not [path for path in out.parent.iterdir() if "emoji" in path.name]


def test_a_place_that_cannot_be_written(registry: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepare(tmp_path / "file" / "emoji")


def test_clients_that_lack_the_picture_or_the_text(tmp_path: Path, out: Path) -> None:
    whole = prepare(tmp_path / "whole", 4, "iid")
    prepared = prepare_emoji(out, Division(4, "iid", missing_modality=0.5), SIZE)
    lacking = prepared.inventory.lacking
    assert sorted(lacking.values()) == ["image", "text"]
    for client, column in lacking.items():
        assert (prepared.client(client) / "images").exists() == (column == "text")
        emptied = [{**row, column: ""} for row in read(whole.client(client))]
        assert read(prepared.client(client)) == emptied
    assert all(row["image"] and row["text"] for row in read(out / "holdout"))
    assert "missing_modality" not in whole.inventory.arguments


def test_what_was_prepared_by_an_earlier_version_is_found(out: Path) -> None:
    prepared = prepare(out)
    inventory = json.loads((out / "dataset.json").read_text())
    del inventory["lacking"]
    for source in inventory["sources"]:
        del source["registry"]
    (out / "dataset.json").write_text(json.dumps(inventory))
    assert prepare(out) == prepared


@pytest.mark.parametrize(("clients", "size_px"), [(0, 32), (-1, 32), (2, 0), (2, 100_000)])
def test_arguments_out_of_range(tmp_path: Path, clients: int, size_px: int) -> None:
    with pytest.raises(UserError):
        prepare_emoji(tmp_path / "emoji", Division(clients, "natural"), size_px)


def test_too_many_clients(out: Path) -> None:
    with pytest.raises(UserError, match="too few"):
        prepare(out, 60, "iid")
    assert not out.exists()


def test_the_inventory_and_the_licenses_name_every_source(out: Path) -> None:
    prepared = prepare(out)
    inventory = json.loads((out / "dataset.json").read_text())
    assert inventory["classes"] == ["faces", "food", "places"]
    assert inventory["arguments"]["seed"] == 0
    licenses = (out / "LICENSES.md").read_text()
    for package, entry in zip(prepared.inventory.sources, inventory["sources"], strict=True):
        assert entry["content"]["sha256"] == package.content.sha256
        assert f"{package.name} 1.0.0 | CC0-1.0 | nobody" in licenses
    counts = inventory["held_out"]["holdout"]
    assert sum(counts.values()) == len(read(out / "holdout"))


def test_a_client_and_the_aggregator_can_open_it(out: Path, tmp_path: Path) -> None:
    prepared = prepare(out)
    image = Modality("image", {"image": TensorSpec((3, SIZE, SIZE), "float32")}, {"size": SIZE})
    for folder in (prepared.client("round"), out / "holdout"):
        dataset = Dataset.open(
            folder,
            {"image": image},
            "classification",
            prepared.inventory.classes,
            Path,
            cache=tmp_path / "c",
        )
        rows = read(folder)
        assert len(dataset) == len(rows)
        assert dataset.groups == tuple(row["group"] for row in rows)
        assert np.isfinite(dataset.batch(range(len(dataset)))["image"]).all()


def test_the_command_prints_json_to_standard_output(out: Path) -> None:
    options = ["prepare", "emoji", "--clients", "2", "--size", "8", "--out", str(out)]
    result = CliRunner().invoke(command, [*options, "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["clients"].keys() == {"square", "round"}
    told = CliRunner().invoke(command, options, catch_exceptions=False)
    assert "clients/square" in told.stdout
    assert "CC0-1.0" in told.stdout


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("man running", "running"),
        ("woman running: facing right", "running"),
        ("people with bunny ears", "with bunny ears"),
        ("person: beard", "beard"),
        ("family: man, woman, boy", "family"),
        ("mermaid", "merperson"),
        ("Mrs. Claus", "claus"),
        ("old man", "person"),
        ("woman", "person"),
        ("keycap: 3", "keycap"),
        ("red apple", "red apple"),
        ("mango", "mango"),
    ],
)
def test_families(label: str, expected: str) -> None:
    assert family(label) == expected


def test_the_text_leaves_out_keywords_that_the_name_holds() -> None:
    wave = Concept("1F44B", "waving hand", ("bye", "hand", "Waving hand", "hand sign"), "people")
    assert wave.text == "waving hand: bye, hand sign"
    assert Concept("1F9D4", "person: beard", ("beard",), "people").text == "person, beard"
    assert Concept("1F3A8", "palette", (), "objects").text == "palette"
