"""All clients' data as one client's."""

from __future__ import annotations

from real_run import EXAMPLES

from inputs.table import read_table
from lamina.experiment.union import ALL, unite


def test_every_example_of_every_client_is_there(data, tmp_path):
    clients = ["ann", "bob", "cy"]
    unite(data, clients, tmp_path / "all")
    names = {"image", "text", "label"}
    union = read_table(tmp_path / "all" / "clients" / ALL, names)
    assert len(union) == 3 * EXAMPLES
    place = 0
    for client in clients:
        own = read_table(data / "clients" / client, names)
        part = slice(place, place + len(own))
        assert union.columns["text"][part] == own.columns["text"]
        assert union.columns["label"][part] == own.columns["label"]
        for ours, theirs in zip(union.columns["image"][part], own.columns["image"], strict=True):
            there = tmp_path / "all" / "clients" / ALL / ours
            assert there.read_bytes() == (data / "clients" / client / theirs).read_bytes()
        place += len(own)
    holdout = read_table(tmp_path / "all" / "holdout", names)
    assert holdout.columns == read_table(data / "holdout", names).columns


def test_a_client_may_lack_a_column(tmp_path):
    for client, content in (("ann", "image,text\na.png,red\n"), ("bob", "text\nblue\n")):
        (tmp_path / "clients" / client).mkdir(parents=True)
        (tmp_path / "clients" / client / "table.csv").write_text(content)
    (tmp_path / "clients" / "ann" / "a.png").write_bytes(b"picture")
    unite(tmp_path, ["ann", "bob"], tmp_path / "all")
    union = read_table(tmp_path / "all" / "clients" / ALL, {"image", "text"})
    assert union.columns == {"image": ["ann/a.png", ""], "text": ["red", "blue"]}
