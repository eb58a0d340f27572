"""What may happen when: the state machines of both sides of a round, as one table.

Rules:
- A round is the same story told twice. The aggregator opens it, collects updates and combines them; a
  client takes the offer, trains, reports and waits for its receipt.
- There is no I/O and no clock here. The programs say what happened (`Event`); the table says where that
  leads. A pair that is not in the table is illegal: it raises `LocalError` and changes nothing.
- What a peer repeats or sends out of turn is sorted out before it becomes an event. So an illegal move is
  always this side's own defect.

Next: `aggregator/run.py` and `edge_client/session.py`, which walk this table.
"""

from __future__ import annotations

from enum import Enum, auto

from wire.errors import LocalError


class State(Enum):
    """Where a side stands."""

    IDLE = auto()  # both: no round is open for us
    COLLECTING = auto()  # aggregator: the offer is out, updates come in
    WAITING = auto()  # aggregator: too few came in time, and nobody is asked until enough clients are there
    COMBINING = auto()  # aggregator: closed for updates, averaging and evaluating
    FETCHING = auto()  # client: the round's files and parameters are on their way
    TRAINING = auto()  # client
    REPORTING = auto()  # client: the update is ready, its receipt is not there
    DONE = auto()  # both: the run is over


class Event(Enum):
    """What happened."""

    OFFER = auto()  # aggregator: published one, or found it after a restart; client: is in its cohort
    UPDATE = auto()  # aggregator: accepted a client's update
    CLOSE = auto()  # aggregator: as many updates as were wanted are in, or enough of them at the deadline
    DEADLINE = auto()  # aggregator: it has passed, and too few are in: clients are slow, silent or gone
    EXTEND = auto()  # aggregator: enough clients are there again, the round is offered for as long again
    CHECKPOINT = auto()  # aggregator: the round's result is on disk
    FETCHED = auto()  # client: files and parameters are there
    TRAINED = auto()  # client: the update is on disk
    RECEIPT = auto()  # client: the aggregator accepted or refused the update
    WITHDRAWN = auto()  # client: the round went on without us, or our attempt at it failed
    FINISH = auto()  # both: no stage is left


class Role(Enum):
    """Which side."""

    AGGREGATOR = auto()
    CLIENT = auto()


TRANSITIONS: dict[Role, dict[State, dict[Event, State]]] = {
    Role.AGGREGATOR: {
        State.IDLE: {Event.OFFER: State.COLLECTING, Event.FINISH: State.DONE},
        State.COLLECTING: {
            Event.UPDATE: State.COLLECTING,
            Event.DEADLINE: State.WAITING,
            Event.CLOSE: State.COMBINING,
        },
        State.WAITING: {
            Event.UPDATE: State.WAITING,
            Event.EXTEND: State.COLLECTING,
            Event.CLOSE: State.COMBINING,
        },
        State.COMBINING: {Event.CHECKPOINT: State.IDLE},
        State.DONE: {},
    },
    Role.CLIENT: {
        State.IDLE: {
            Event.OFFER: State.FETCHING,
            Event.WITHDRAWN: State.IDLE,
            Event.RECEIPT: State.IDLE,
            Event.FINISH: State.DONE,
        },
        State.FETCHING: {
            Event.FETCHED: State.TRAINING,
            Event.WITHDRAWN: State.IDLE,
            Event.FINISH: State.DONE,
        },
        State.TRAINING: {
            Event.TRAINED: State.REPORTING,
            Event.WITHDRAWN: State.IDLE,
            Event.FINISH: State.DONE,
        },
        State.REPORTING: {
            Event.RECEIPT: State.IDLE,
            Event.WITHDRAWN: State.IDLE,
            Event.FINISH: State.DONE,
        },
        State.DONE: {Event.FINISH: State.DONE},
    },
}


class RoundMachine:
    """One side's state. `state` only changes through `move`."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state = State.IDLE

    def move(self, event: Event) -> State:
        """The state after `event`. Raises `LocalError`, and stays, where the table has no such move."""
        try:
            self.state = TRANSITIONS[self.role][self.state][event]
        except KeyError:
            raise LocalError(
                f"{self.role.name.lower()} in {self.state.name} cannot take {event.name}"
            ) from None
        return self.state
