"""Who may use the model next: one at a time, and those who have used it least go first."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

FORGET = 0.5  # how much of what a visitor has used is forgotten when the queue is empty
SMOOTHING = 0.3  # weight of the newest measurement of the speed


@dataclass(frozen=True)
class Who:
    """Whose turn it is.

    Args:
        visitor: `visitors.visitor_of`.
        address: of the visitor's computer, or of the router in front of it.
    """

    visitor: str
    address: str = ""


@dataclass(eq=False)
class Ticket:
    """A place in the queue."""

    who: Who
    cost: float  # in denoising steps of one picture, or about as long
    number: int
    is_served: bool = field(default=False)


class Turns:
    """The queue for the model.

    Args:
        places: how many may wait.
        per_visitor: how many of them for one visitor.
        per_address: how many for one address; a classroom may share one.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        places: int = 32,
        per_visitor: int = 4,
        per_address: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.places = places
        self.per_visitor = per_visitor
        self.per_address = places if per_address is None else per_address
        self.clock = clock
        self.seconds_per_unit: float | None = None  # measured
        self._changed = threading.Condition()
        self._waiting: list[Ticket] = []
        self._current: Ticket | None = None
        self._began = 0.0
        self._used: dict[str, float] = {}
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def turn(
        self,
        who: Who,
        cost: float,
        on_wait: Callable[[int, float | None], None] | None = None,
        again: bool = False,
    ) -> Iterator[None]:
        """Waits for the turn and holds the model within it.

        Args:
            who: waits.
            cost: see `Ticket`.
            on_wait: called about once a second meanwhile with how many go before, and in how many seconds it is this
                one's turn (`None` while nothing was measured yet). Whatever it raises gives the place up.
            again: it goes on with what was begun: there is always a place.

        Raises:
            ValueError: where no place is left, for anybody or for this visitor.
        """
        ticket = self._take_place(who, cost, again)
        try:
            while not self._served(ticket):
                if on_wait is not None:
                    on_wait(*self.ahead_of(ticket))
            yield
            self._measure(ticket)
        finally:
            self._leave(ticket)

    def ahead_of(self, ticket: Ticket) -> tuple[int, float | None]:
        """How many are served before a ticket, the current one included, and how long that takes in seconds."""
        with self._changed:
            before = list(itertools.takewhile(lambda other: other is not ticket, self._order()))
            cost = sum(other.cost for other in before)
            running = 0
            if self._current is not None:
                running = 1
                spent = self.clock() - self._began
                cost += max(self._current.cost - spent / (self.seconds_per_unit or 1), 0)
        seconds = None if self.seconds_per_unit is None else cost * self.seconds_per_unit
        return len(before) + running, seconds

    def seconds_for(self, cost: float) -> float | None:
        """How long work of this cost takes, `None` while nothing was measured yet."""
        return None if self.seconds_per_unit is None else cost * self.seconds_per_unit

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def _take_place(self, who: Who, cost: float, again: bool) -> Ticket:
        with self._changed:
            if not again:
                self._check_places(who)
            ticket = Ticket(who, cost, next(self._numbers))
            self._waiting.append(ticket)
            # A new visitor starts at the lowest use among those who wait: no credit for absence.
            least = min((self._used[other.who.visitor] for other in self._waiting[:-1]), default=0.0)
            self._used[who.visitor] = max(self._used.get(who.visitor, 0.0), least)
            return ticket

    def _check_places(self, who: Who) -> None:
        if len(self._waiting) >= self.places:
            raise ValueError(
                f"Too many people wait for the model: {len(self._waiting)}. Please try again in a minute."
            )
        own = sum(ticket.who.visitor == who.visitor for ticket in self._waiting)
        if own >= self.per_visitor:
            raise ValueError(f"{own} of your requests wait already, as many as may: wait for one of them.")
        if sum(ticket.who.address == who.address for ticket in self._waiting) >= self.per_address:
            raise ValueError("Your address has as many requests waiting as it may. Try again in a minute.")

    def _order(self) -> list[Ticket]:
        """Those who wait in the order in which they would be served, if nobody came."""
        used = dict(self._used)
        left, order = list(self._waiting), []
        while left:
            first = min(left, key=lambda ticket: (used[ticket.who.visitor], ticket.number))
            used[first.who.visitor] += first.cost
            left.remove(first)
            order.append(first)
        return order

    def _served(self, ticket: Ticket, seconds: float = 1.0) -> bool:
        """Waits for up to `seconds`; whether the ticket's turn has come."""

        def is_next() -> bool:
            return self._current is None and self._order()[0] is ticket

        with self._changed:
            if not self._changed.wait_for(is_next, seconds):
                return False
            self._waiting.remove(ticket)
            self._current, self._began = ticket, self.clock()
            ticket.is_served = True
            return True

    def _measure(self, ticket: Ticket) -> None:
        """Notes the speed; work that was stopped half-way says nothing of it."""
        with self._changed:
            seconds = (self.clock() - self._began) / ticket.cost
            known = seconds if self.seconds_per_unit is None else self.seconds_per_unit
            self.seconds_per_unit = (1 - SMOOTHING) * known + SMOOTHING * seconds

    def _leave(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket.is_served:
                self._current = None
                visitor = ticket.who.visitor
                self._used[visitor] = self._used.get(visitor, 0.0) + ticket.cost
            else:
                self._waiting.remove(ticket)
            if not self._waiting:
                self._used = {visitor: used * FORGET for visitor, used in self._used.items() if used * FORGET > 1}
            self._changed.notify_all()
