"""The rounds' table: every move of it, every move that is not in it, and both sides together."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire.errors import LocalError
from wire.rounds import TRANSITIONS, Event, Role, RoundMachine, State

AGGREGATOR, CLIENT = Role.AGGREGATOR, Role.CLIENT
EVERY_PAIR = list(itertools.product(Role, State, Event))

# Told from the start of a run: what happens and where that leads. Together they are the whole table.
STORIES: dict[str, tuple[Role, list[tuple[Event, State]]]] = {
    "a round that everybody answers": (
        AGGREGATOR,
        [
            (Event.OFFER, State.COLLECTING),
            (Event.UPDATE, State.COLLECTING),
            (Event.UPDATE, State.COLLECTING),
            (Event.CLOSE, State.COMBINING),
            (Event.CHECKPOINT, State.IDLE),
            (Event.FINISH, State.DONE),
        ],
    ),
    "too few at the deadline": (
        AGGREGATOR,
        [
            (Event.OFFER, State.COLLECTING),
            (Event.DEADLINE, State.WAITING),
            (Event.EXTEND, State.COLLECTING),
            (Event.DEADLINE, State.WAITING),
            (Event.EXTEND, State.COLLECTING),
            (Event.UPDATE, State.COLLECTING),
            (Event.CLOSE, State.COMBINING),
            (Event.CHECKPOINT, State.IDLE),
            (Event.OFFER, State.COLLECTING),
        ],
    ),
    "all are gone, and come back with what they had": (
        AGGREGATOR,
        [
            (Event.OFFER, State.COLLECTING),
            (Event.DEADLINE, State.WAITING),
            (Event.UPDATE, State.WAITING),
            (Event.CLOSE, State.COMBINING),
        ],
    ),
    "two rounds of a client": (
        CLIENT,
        [
            (Event.OFFER, State.FETCHING),
            (Event.FETCHED, State.TRAINING),
            (Event.TRAINED, State.REPORTING),
            (Event.RECEIPT, State.IDLE),
            (Event.RECEIPT, State.IDLE),
            (Event.WITHDRAWN, State.IDLE),
            (Event.OFFER, State.FETCHING),
            (Event.FETCHED, State.TRAINING),
            (Event.TRAINED, State.REPORTING),
            (Event.WITHDRAWN, State.IDLE),
            (Event.FINISH, State.DONE),
            (Event.FINISH, State.DONE),
        ],
    ),
    "withdrawn while it fetches": (
        CLIENT,
        [(Event.OFFER, State.FETCHING), (Event.WITHDRAWN, State.IDLE), (Event.OFFER, State.FETCHING)],
    ),
    "withdrawn while it trains": (
        CLIENT,
        [(Event.OFFER, State.FETCHING), (Event.FETCHED, State.TRAINING), (Event.WITHDRAWN, State.IDLE)],
    ),
    "over while it fetches": (CLIENT, [(Event.OFFER, State.FETCHING), (Event.FINISH, State.DONE)]),
    "over while it trains": (
        CLIENT,
        [(Event.OFFER, State.FETCHING), (Event.FETCHED, State.TRAINING), (Event.FINISH, State.DONE)],
    ),
    "over before its receipt": (
        CLIENT,
        [
            (Event.OFFER, State.FETCHING),
            (Event.FETCHED, State.TRAINING),
            (Event.TRAINED, State.REPORTING),
            (Event.FINISH, State.DONE),
        ],
    ),
}


class Pair:
    """Both sides of a round in memory."""

    def __init__(self) -> None:
        self.aggregator, self.client = RoundMachine(AGGREGATOR), RoundMachine(CLIENT)

    @property
    def states(self) -> tuple[State, State]:
        return self.aggregator.state, self.client.state


def machine_in(role: Role, state: State) -> RoundMachine:
    machine = RoundMachine(role)
    machine.state = state
    return machine


def reachable(role: Role, start: State) -> set[State]:
    """States that some moves lead to from `start`; `start` itself only by coming back."""
    seen: set[State] = set()
    todo = [start]
    while todo:
        for state in TRANSITIONS[role].get(todo.pop(), {}).values():
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return seen


@pytest.mark.parametrize("role", Role)
def test_both_sides_start_idle(role: Role):
    assert (RoundMachine(role).role, RoundMachine(role).state) == (role, State.IDLE)


@pytest.mark.parametrize(("role", "moves"), STORIES.values(), ids=STORIES)
def test_a_story_goes_as_told(role: Role, moves: list[tuple[Event, State]]):
    machine = RoundMachine(role)
    for event, state in moves:
        assert machine.move(event) is state
        assert machine.state is state


def test_the_stories_are_the_whole_table():
    told = set()
    for role, moves in STORIES.values():
        before = State.IDLE
        for event, after in moves:
            told.add((role, before, event, after))
            before = after
    assert told == {
        (role, before, event, after)
        for role, rows in TRANSITIONS.items()
        for before, row in rows.items()
        for event, after in row.items()
    }


@pytest.mark.parametrize(("role", "state", "event"), EVERY_PAIR)
def test_a_move_leads_where_the_table_says_or_nowhere(role: Role, state: State, event: Event):
    machine = machine_in(role, state)
    after = TRANSITIONS[role].get(state, {}).get(event)
    if after is not None:
        assert machine.move(event) is after
        assert machine.state is after
        return
    with pytest.raises(LocalError) as caught:
        machine.move(event)
    assert machine.state is state
    assert machine.role is role
    for part in (role.name.lower(), state.name, event.name):
        assert part in str(caught.value)


def test_most_moves_are_illegal():
    legal = [pair for pair in EVERY_PAIR if pair[2] in TRANSITIONS[pair[0]].get(pair[1], {})]
    assert len(legal) < len(EVERY_PAIR) / 4


def test_both_sides_go_through_a_run_together():
    pair = Pair()
    for _ in range(3):
        assert pair.states == (State.IDLE, State.IDLE)
        pair.aggregator.move(Event.OFFER)
        pair.client.move(Event.OFFER)
        assert pair.states == (State.COLLECTING, State.FETCHING)
        pair.client.move(Event.FETCHED)
        pair.client.move(Event.TRAINED)
        assert pair.states == (State.COLLECTING, State.REPORTING)
        pair.aggregator.move(Event.UPDATE)
        pair.client.move(Event.RECEIPT)
        assert pair.states == (State.COLLECTING, State.IDLE)
        pair.aggregator.move(Event.CLOSE)
        pair.aggregator.move(Event.CHECKPOINT)
    pair.aggregator.move(Event.FINISH)
    pair.client.move(Event.FINISH)
    assert pair.states == (State.DONE, State.DONE)


def test_a_client_that_is_late_joins_the_next_round():
    pair = Pair()
    pair.aggregator.move(Event.OFFER)
    pair.client.move(Event.OFFER)
    pair.client.move(Event.FETCHED)
    pair.aggregator.move(Event.DEADLINE)
    pair.aggregator.move(Event.EXTEND)
    pair.aggregator.move(Event.UPDATE)  # another client's
    pair.aggregator.move(Event.CLOSE)
    pair.aggregator.move(Event.CHECKPOINT)
    pair.aggregator.move(Event.OFFER)
    assert pair.states == (State.COLLECTING, State.TRAINING)
    pair.client.move(Event.WITHDRAWN)
    pair.client.move(Event.OFFER)
    assert pair.states == (State.COLLECTING, State.FETCHING)


def test_an_illegal_move_of_one_side_does_not_disturb_the_other():
    pair = Pair()
    pair.aggregator.move(Event.OFFER)
    with pytest.raises(LocalError):
        pair.client.move(Event.TRAINED)
    with pytest.raises(LocalError):
        pair.aggregator.move(Event.OFFER)
    assert pair.states == (State.COLLECTING, State.IDLE)
    pair.client.move(Event.OFFER)
    assert pair.states == (State.COLLECTING, State.FETCHING)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(role=st.sampled_from(Role), events=st.lists(st.sampled_from(Event), max_size=40))
def test_any_events_keep_a_side_in_its_own_states(role: Role, events: list[Event]):
    machine = RoundMachine(role)
    for event in events:
        before = machine.state
        try:
            machine.move(event)
        except LocalError:
            assert machine.state is before
        assert machine.state in TRANSITIONS[role]
        assert before is not State.DONE or machine.state is State.DONE


@pytest.mark.parametrize("role", Role)
def test_every_state_is_reached_and_none_is_a_trap(role: Role):
    assert {State.IDLE} | reachable(role, State.IDLE) == set(TRANSITIONS[role])
    for state in set(TRANSITIONS[role]) - {State.DONE}:
        assert State.DONE in reachable(role, state)
        assert state is State.IDLE or State.IDLE in reachable(role, state)
    assert reachable(role, State.DONE) <= {State.DONE}


def test_nothing_is_unused():
    assert set(TRANSITIONS) == set(Role)
    rows = [rows for table in TRANSITIONS.values() for rows in table.values()]
    assert {event for row in rows for event in row} == set(Event)
    assert {state for table in TRANSITIONS.values() for state in table} == set(State)
