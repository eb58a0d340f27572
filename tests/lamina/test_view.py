"""The live view: what the board knows after each event, and what a person reads of it."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from aggregator.events import (
    ClientCame,
    ClientLeft,
    Figures,
    RoundClosed,
    RoundOpened,
    RunClosed,
    RunOpened,
    UpdateAccepted,
    UpdateRefused,
    UsageTold,
)
from lamina.view import NEWS, Board, View, summary
from wire.messages import Hello, RoundKey, Usage

RECALLS = {
    "recall@1": 0.25,
    "recall@10": 0.754,
    "image_to_text@1": 0.111,
    "chance@1": 0.05,
    "chance@10": 0.5,
}
ACCURACY = {"accuracy": 0.876, "chance": 0.4}
MODEL = "/home/someone/lamina-work/runs/layerwise-s0-20250101-101010/aggregator/model"
OPENED = RunOpened("demo", "layerwise", (2, 1), (123_456, 65_432), 2)


def key(stage, number):
    return RoundKey(stage, number)


def came(client, images):
    return ClientCame(client, Hello({"image": images, "text": images - 1}, "ort-training", 4096, "0.1.0"))


def accepted(stage, number, client, loss=1.5):
    return UpdateAccepted(key(stage, number), client, 100, loss, 400_000)


def used(client, peak_mb):
    return UsageTold(client, Usage(key(0, 0), 1_000_000, 2_500_000, peak_mb * 1_000_000, 3.2))


def figures(metrics, loss, rounds, sent_mb=1.25, refusals=0, raw_bytes=400_000):
    sent, received = int(sent_mb * 1e6), int(3 * sent_mb * 1e6)
    return Figures(
        metrics,
        loss,
        sent,
        received,
        update_bytes_per_client=400_000,
        raw_update_bytes_per_client=raw_bytes,
        peak_rss_mb_per_client=100 * sent_mb,
        cpu_s_per_client=1.0,
        rounds=rounds,
        updates=6,
        refusals=refusals,
        seconds=60.9 * sent_mb,
    )


def a_run(metrics=RECALLS, loss=1.5):
    """Two stages of two rounds and one: a refusal, a client that leaves, a round that is offered again."""
    return [
        OPENED,
        came("ann", 100),
        came("bob", 200),
        came("cleo", 1190),
        RoundOpened(key(0, 0), ("ann", "bob", "cleo")),
        accepted(0, 0, "ann", loss),
        UpdateRefused(key(0, 0), "bob", "not_finite", "head.log_scale holds NaN or infinity"),
        used("ann", 150),
        ClientLeft("cleo"),
        RoundOpened(key(0, 0), ("ann", "bob"), extended=True),
        accepted(0, 0, "bob", loss),
        RoundClosed(key(0, 0), ("ann", "bob"), ("cleo",), loss, metrics, 12.3),
        RoundOpened(key(0, 1), ("ann", "bob")),
        accepted(0, 1, "ann", loss),
        accepted(0, 1, "bob", loss),
        RoundClosed(key(0, 1), ("ann", "bob"), (), loss, metrics, 62.8),
        used("ann", 160),
        came("cleo", 1191),
        RoundOpened(key(1, 0), ("ann", "bob", "cleo")),
        accepted(1, 0, "cleo", loss),
        accepted(1, 0, "ann", loss),
        RoundClosed(key(1, 0), ("ann", "cleo"), ("bob",), loss, metrics, 2.0),
        RunClosed(
            "layerwise",
            "ort-training",
            0,
            (figures(metrics, loss, 2), figures(dict.fromkeys(metrics, 0.333), loss, 1, sent_mb=2.5)),
            figures(metrics, loss, 3, sent_mb=7.25, refusals=4),
            MODEL,
        ),
    ]


def board_after(*events):
    board = Board()
    for event in events:
        board.take(event)
    return board


def drawn(events, **console):
    """What is written, and where it was wrapped only where the console's width asks for it."""
    file = io.StringIO()
    with View(Console(file=file, **{"width": 140, **console})) as view:
        for event in events:
            view.show(event)
    return file.getvalue()


def test_a_new_run_waits_for_clients():
    board = board_after(OPENED)
    assert (board.run, board.schedule) == ("demo", "layerwise")
    assert "waiting for 2 clients" in board.status
    assert [(stage.rounds, stage.parameters, stage.done) for stage in board.stages] == [
        (2, 123_456, 0),
        (1, 65_432, 0),
    ]
    assert board.clients == {}


@pytest.mark.parametrize(
    ("resumed", "done"), [(key(0, 1), [1, 0, 0]), (key(1, 0), [2, 0, 0]), (key(1, 3), [2, 3, 0])]
)
def test_a_resumed_run_has_its_earlier_rounds_behind_it(resumed, done):
    board = board_after(RunOpened("demo", "layerwise", (2, 3, 4), (1, 2, 3), 2, resumed))
    assert [stage.done for stage in board.stages] == done


def test_clients_come_and_go():
    board = board_after(OPENED, came("ann", 100), came("bob", 200), ClientLeft("ann"))
    ann, bob = board.clients["ann"], board.clients["bob"]
    assert (ann.engine, ann.examples, ann.state) == ("ort-training", 100, "gone")
    assert (bob.examples, bob.state) == (200, "here")
    assert list(board.news) == ["ann is gone"]
    board.take(came("ann", 101))
    assert (ann.examples, ann.state) == (101, "here")


def test_a_round_from_its_offer_to_its_end():
    board = board_after(*a_run()[:5])
    assert board.status == "stage 1 round 1"
    assert {client.state for client in board.clients.values()} == {"training"}
    board.take(accepted(0, 0, "ann", 0.75))
    assert (board.clients["ann"].state, board.clients["ann"].loss) == ("done", 0.75)
    board.take(UpdateRefused(key(0, 0), "bob", "not_finite", "a holds NaN"))
    assert (board.clients["bob"].state, board.clients["bob"].loss) == ("not_finite", None)
    assert board.news[-1] == "bob: not_finite, a holds NaN"
    board.take(RoundOpened(key(0, 0), ("ann", "bob"), extended=True))
    assert "stage 1 round 1 is offered again" in board.news[-1]
    board.take(RoundClosed(key(0, 0), ("ann",), ("bob", "cleo"), 0.5, RECALLS, 12.5))
    stage = board.stages[0]
    assert (stage.done, stage.loss, stage.metrics, stage.seconds) == (1, 0.5, RECALLS, 12.5)
    assert board.news[-1] == "stage 1 round 1 ended without bob, cleo"


def test_a_whole_run_adds_up():
    board = board_after(*a_run())
    assert [(stage.done, stage.rounds) for stage in board.stages] == [(2, 2), (1, 1)]
    assert [stage.seconds for stage in board.stages] == pytest.approx([75.1, 2.0])
    ann = board.clients["ann"]
    assert (ann.bytes_sent, ann.bytes_received, ann.peak_rss_mb) == (2_000_000, 5_000_000, 160.0)
    assert board.clients["cleo"].examples == 1191
    assert board.status == "done"
    assert board.closed == a_run()[-1]


@pytest.mark.parametrize(
    "event",
    [
        ClientLeft("dan"),
        RoundOpened(key(0, 0), ("dan",)),
        accepted(0, 0, "dan"),
        UpdateRefused(key(7, 7), "dan", "wrong_stage", "it is for stage 8"),
        used("dan", 100),
    ],
)
def test_a_client_that_has_not_said_hello_is_no_trouble(event):
    for terminal in (False, True):
        assert drawn([OPENED, event], force_terminal=terminal)


def test_the_oldest_news_make_room():
    board = board_after(OPENED, *(ClientLeft(f"c{number}") for number in range(NEWS + 2)))
    assert [line.split()[0] for line in board.news] == [f"c{number}" for number in range(2, NEWS + 2)]


def test_without_a_terminal_a_round_is_a_line():
    lines = drawn(a_run()).split("\n")
    assert [line for line in lines if line.startswith("stage ") and " round " in line] == [
        "stage 1 round 1 of 2: 2 updates, loss 1.500, recall@10 75.4% (chance 50.0%), 12.3 s, without cleo",
        "stage 1 round 2 of 2: 2 updates, loss 1.500, recall@10 75.4% (chance 50.0%), 62.8 s",
        "stage 2 round 1 of 1: 2 updates, loss 1.500, recall@10 75.4% (chance 50.0%), 2.0 s, without bob",
    ]
    assert sum("is here" in line for line in lines) == 4
    assert "ann is here: 100 examples, ort-training" in lines
    assert "cleo is gone" in lines
    [refusal] = [line for line in lines if "refused an update" in line]
    assert "bob" in refusal
    assert "stage 1 round 1" in refusal
    assert refusal.endswith("not_finite, head.log_scale holds NaN or infinity")
    assert lines[0] == "run demo: layerwise, 2 stages, waiting for 2 clients"


def test_a_narrow_log_breaks_no_line():
    wide, narrow = drawn(a_run()[:-1]), drawn(a_run()[:-1], width=30)
    assert narrow == wide
    assert "\x1b" not in wide


@pytest.mark.parametrize("terminal", [False, True])
def test_the_table_at_the_end(terminal):
    text = drawn(a_run(), force_terminal=terminal, color_system=None)
    end = text[text.rindex("\x1b[?25h" if terminal else "without bob") :]
    for fact in ("stage 1", "stage 2", "whole run", "25.0%", "75.4%", "33.3%", "chance", "5.0%", "50.0%"):
        assert fact in end
    for sent, received, memory, time in (
        ("1.25 MB", "3.75 MB", "125 MB", "1:16"),
        ("2.50 MB", "7.50 MB", "250 MB", "2:32"),
        ("7.25 MB", "21.75 MB", "725 MB", "7:21"),
    ):
        assert all(end.count(fact) == 1 for fact in (sent, received, memory, time))
    assert "4 updates were refused" in end
    assert f"The final model is in {MODEL}" in end
    assert text.count("whole run") == 1


def test_the_table_fits_a_terminal_of_80():
    end = drawn(a_run()[-1:], width=80)
    assert max(len(line.rstrip()) for line in end.split("\n")) <= 80
    assert "…" not in end
    assert any(line.split()[:2] == ["whole", "run"] and "7.25 MB" in line for line in end.split("\n"))


def test_no_refusals_are_not_told():
    file = io.StringIO()
    closed = RunClosed("layerwise", "", 0, (figures({}, 1.0, 1),), figures({}, 1.0, 1), MODEL)
    Console(file=file, width=140).print(summary(closed))
    assert "refused" not in file.getvalue()


def test_accuracy_is_told_too():
    text = drawn(a_run(ACCURACY))
    assert "accuracy 87.6% (chance 40.0%)" in text
    end = text[text.rindex("without bob") :]
    assert all(fact in end for fact in ("accuracy", "87.6%", "chance", "40.0%"))


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [40, 80, 140])
@pytest.mark.parametrize(
    ("metrics", "loss"),
    [({}, 1.5), (RECALLS, math.nan), ({}, math.nan), ({"perplexity": 3.0}, math.inf), ({}, -0.0)],
)
def test_without_a_holdout_or_a_loss_nothing_breaks(metrics, loss, width, terminal):
    text = drawn(a_run(metrics, loss), width=width, force_terminal=terminal)
    if not metrics and not terminal:
        assert "%" not in text
    if not terminal:
        assert f"2 updates, loss {loss:.3f}, " in text
    assert MODEL in text.replace("\n", "")


def test_a_terminal_shows_stages_clients_and_news():
    lines = drawn(a_run()[:12], force_terminal=True, color_system=None).split("\n")
    frame = [line.rstrip() for line in lines]
    [title] = [line for line in frame if "demo layerwise" in line]
    assert title.endswith("stage 1 round 1")
    [one] = [line for line in frame if line.startswith("1  ")]
    [two] = [line for line in frame if line.startswith("2  ")]
    assert one.split()[:3] == ["1", "123,456", "1/2"]
    assert one.endswith("0:12")
    assert "recall@10 75.4%" in one
    assert two.split()[:3] == ["2", "65,432", "0/1"]
    states = {line.split()[0]: line.split()[1:] for line in frame if "ort-training" in line}
    assert states.keys() == {"ann", "bob", "cleo"}
    assert states["bob"] == ["ort-training", "done", "1.500"]
    assert states["cleo"] == ["ort-training", "gone"]
    assert states["ann"][-6:] == ["1.00", "MB", "2.50", "MB", "150", "MB"]
    assert sum(line.startswith("  ") for line in frame) == 4
    assert "  cleo is gone" in frame


def test_a_loss_of_zero_is_a_loss():
    text = drawn(a_run(loss=0.0)[:12], force_terminal=True, color_system=None)
    assert text.count("0.000") == 3  # the stage's, ann's and bob's


@pytest.mark.parametrize("width", [80, 120, 140])
def test_no_line_is_wider_than_the_terminal(width):
    for upto in range(1, len(a_run()) + 1):
        text = drawn(a_run()[:upto], width=width, force_terminal=True, color_system=None)
        for control in ("\x1b[?25l", "\x1b[?25h"):
            text = text.replace(control, "")
        assert max(map(len, text.split("\n"))) <= width


@pytest.mark.parametrize("ends_well", [True, False])
def test_the_cursor_comes_back(ends_well):
    file = io.StringIO()
    try:
        with View(Console(file=file, width=140, force_terminal=True)) as view:
            view.show(OPENED)
            if not ends_well:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 1


def test_before_the_run_begins():
    file = io.StringIO()
    with View(Console(file=file, width=140)) as view:
        view.status("exporting tiny for layerwise")
        view.note("ann was killed (SIGKILL), starting it again")
    assert file.getvalue() == (
        "exporting tiny for layerwise\nann was killed (SIGKILL), starting it again\n"
    )
    file = io.StringIO()
    with View(Console(file=file, width=140, force_terminal=True)) as view:
        view.status("exporting tiny for layerwise")
        view.note("ann was killed (SIGKILL), starting it again")
    assert "exporting tiny for layerwise" in file.getvalue()
    assert "ann was killed (SIGKILL), starting it again" in file.getvalue()


def test_standard_output_is_left_to_results(capsys):
    with View() as view:
        view.status("exporting")
        for event in a_run():
            view.show(event)
    out, err = capsys.readouterr()
    assert out == ""
    assert "exporting" in err
    assert "stage 2 round 1 of 1" in err


def test_the_end_tells_what_compression_has_saved():
    plain = figures(RECALLS, 1.0, 2)
    small = figures(RECALLS, 1.0, 2, raw_bytes=1_610_000)
    line = "A client's updates took 0.40 MB; uncompressed they would have taken 1.61 MB."
    for total, expected in ((plain, False), (small, True)):
        text = drawn([RunClosed("layerwise", "onnx", 0, (total,), total, MODEL)])
        assert (line in text) == expected
