"""The stamps, from a package of a few tones: who is held out, what is written and refused."""

from __future__ import annotations

import csv
import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_registry import NUM_STAMPS

from export.tokenizer import train_tokenizer
from inputs.dataset import Dataset
from inputs.wav import read_wav
from lamina.data.command import command
from lamina.data.division import Division
from lamina.data.folder import Prepared
from lamina.data.stamps import prepare_stamps, split
from lamina.data.stamps_sources import RATE_HZ, Recording
from models.registry import build
from wire.errors import UserError

LANGUAGES = ("el", "fr")  # of the package; of German there is no client


@pytest.fixture
def out(stamps_registry: None, tmp_path: Path) -> Path:
    return tmp_path / "stamps"


def prepare(out: Path, clients: int = 2, partition: str = "natural", **more: Any) -> Prepared:
    return prepare_stamps(out, Division(clients, partition, **more))  # type: ignore[arg-type]


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rows_of_clients(prepared: Prepared) -> list[dict[str, str]]:
    return [row for name in prepared.inventory.clients for row in read(prepared.client(name))]


def test_a_natural_client_is_a_language(out: Path) -> None:
    prepared = prepare(out)
    assert tuple(prepared.inventory.clients) == LANGUAGES
    for client in LANGUAGES:
        rows = read(prepared.client(client))
        assert {row["group"] for row in rows} == {client}
        assert {row["text"].split()[0] for row in rows} == {{"el": "Πράγμα", "fr": "Chose"}[client]}
        assert {row["label"] for row in rows} == {"animals", "food"}
    assert prepared.inventory.classes == ("animals", "food")


def test_the_sound_is_that_of_the_name(out: Path) -> None:
    prepared = prepare(out)
    for row in read(prepared.client("el")):
        place = int(row["text"].rstrip(".").split()[1])
        assert row["audio"] == f"audio/el-{row['label']}-thing{place:02}.wav"
        samples, rate_hz = read_wav(prepared.client("el") / row["audio"], 9)
        assert rate_hz == RATE_HZ
        assert abs(len(samples) / rate_hz - (0.1 + 0.01 * max(place, 1))) < 0.002
        spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 1 << 16))
        assert abs(spectrum.argmax() * RATE_HZ / (1 << 16) - (300 + 20 * place)) < 5
        assert 0.3 < np.abs(samples).max() < 0.7  # one of two channels is silent


def test_what_is_held_out_is_held_out_in_every_language(out: Path) -> None:
    prepared = prepare(out)

    def places(rows: list[dict[str, str]]) -> set[int]:
        return {int(row["audio"].removesuffix(".wav")[-2:]) for row in rows}

    trained, asked = places(rows_of_clients(prepared)), places(read(prepared.folder / "holdout"))
    assert trained.isdisjoint(asked)
    assert 0 < len(asked) < NUM_STAMPS / 3
    assert trained | asked == set(range(NUM_STAMPS - 1))
    assert set(prepared.inventory.held_out["holdout"]) == set(LANGUAGES)


def test_no_two_recordings_of_a_language_are_the_same(out: Path) -> None:
    """`tone` of the same pitch and length is another file each time, with the same sound in it."""
    prepared = prepare(out)
    folders = [*map(prepared.client, LANGUAGES), out / "holdout"]
    sounds = [
        (row["group"], (folder / row["audio"]).read_bytes()) for folder in folders for row in read(folder)
    ]
    assert len(sounds) == len(set(sounds))
    texts = [row["text"] for row in [*rows_of_clients(prepared), *read(out / "holdout")]]
    assert texts.count("Chose 1.") == 1
    # All Greek names but the last stamp's, which has none; one less in French, and the pair's.
    assert len(texts) == 2 * (NUM_STAMPS - 1) - 2


def recording(stamp: str, english: str, text: str, language: str = "fr", wav: bytes = b"") -> Recording:
    return Recording(f"food/{stamp}", language, english, text, wav or f"{language} {stamp}".encode())


HELD_OUT, TRAINED = "Dog", "Cat"


def test_who_is_held_out_goes_by_the_english_name() -> None:
    same = [recording(stamp, HELD_OUT + mark, stamp) for stamp, mark in (("a", ""), ("b", "."), ("c", " "))]
    assert split(same) == ([], same)
    other = [recording(stamp, TRAINED, "same") for stamp in "def"]
    assert split([*other, *same]) == (other, same)


def test_a_recording_is_taken_once() -> None:
    first, again = (recording(stamp, TRAINED, "text", wav=b"same") for stamp in "ab")
    elsewhere = recording("c", TRAINED, "text", "ru", b"same")
    assert split([first, again, elsewhere]) == ([first, elsewhere], [])
    trained, asked = (recording(n, name, n, wav=b"same") for n, name in (("a", TRAINED), ("b", HELD_OUT)))
    assert split([trained, asked]) == ([trained], [])
    assert split([asked, trained]) == ([], [asked])


def test_a_name_is_asked_for_once_and_not_if_it_was_trained_on() -> None:
    first, again, known = (
        recording(n, HELD_OUT, text) for n, text in (("a", "A  1"), ("b", "a 1."), ("c", "B, c"))
    )
    trained = recording("d", TRAINED, "b c")
    assert split([first, again, known, trained]) == ([trained], [first])
    in_other_words = recording("d", TRAINED, "b c", "ru")
    assert split([known, in_other_words]) == ([in_other_words], [known])


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_other_partitions_share_the_same_examples(tmp_path: Path, out: Path, partition: str) -> None:
    natural = prepare(out)
    other = prepare(tmp_path / partition, 3, partition, seed=3)
    assert list(other.inventory.clients) == ["client-1", "client-2", "client-3"]
    assert sorted(row["audio"] for row in rows_of_clients(natural)) == sorted(
        row["audio"] for row in rows_of_clients(other)
    )
    assert (out / "holdout/table.csv").read_bytes() == (other.folder / "holdout/table.csv").read_bytes()


def test_public_examples_and_missing_sound(out: Path) -> None:
    prepared = prepare(out, public=0.2, missing_modality=0.5)
    assert {row["group"] for row in read(out / "public")} == set(LANGUAGES)
    ((client, lacks),) = prepared.inventory.lacking.items()
    assert {row[lacks] for row in read(prepared.client(client))} == {""}


def test_the_preset_reads_it(out: Path, tmp_path: Path) -> None:
    prepared = prepare(out)
    (tmp_path / "pieces").write_bytes(
        train_tokenizer([row["text"] for row in rows_of_clients(prepared)], 60)
    )
    model = build("stamps")
    dataset = Dataset.open(
        out / "holdout",
        model.modalities,
        "contrastive",
        (),
        lambda _: tmp_path / "pieces",
        cache=tmp_path / "c",
    )
    batch = dataset.batch(range(len(dataset)))
    assert {name: array.shape[1:] for name, array in batch.items()} == {
        name: spec.shape for name, spec in model.inputs.items()
    }
    assert set(dataset.groups or ()) == set(LANGUAGES)


def test_the_command(out: Path) -> None:
    options = ["prepare", "stamps", "--clients", "2", "--out", str(out), "--json"]
    result = CliRunner().invoke(command, options, catch_exceptions=False)
    inventory = json.loads(result.stdout)
    assert inventory["arguments"]["clients"] == 2
    assert set(inventory["clients"]) == set(LANGUAGES)


def test_it_is_found_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(out)
    monkeypatch.setattr("lamina.data.stamps.fetch", lambda *_: pytest.fail("fetched again"))
    assert prepare(out) == prepared


@pytest.mark.parametrize("error", [ImportError("no module"), OSError("sndfile library not found")])
def test_without_soundfile(out: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Or without the library that it needs; told before anything is fetched."""

    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name == "soundfile":
                raise error

    monkeypatch.delitem(sys.modules, "soundfile")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.setattr("lamina.data.stamps.fetch", lambda *_: pytest.fail("fetched"))
    with pytest.raises(UserError, match=f"needs soundfile .{error}"):
        prepare(out)


def test_too_many_clients(out: Path) -> None:
    with pytest.raises(UserError, match="too few"):
        prepare(out, 20, "iid")
    assert not out.exists()
