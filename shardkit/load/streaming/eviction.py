"""Who has a place in the ring: a page takes it from those that nobody needs now, and of these from
who was there the longest.

1. A page that is held, or that a reader is at, keeps its place. So does, for a while, one that
   nobody came for yet.
2. What is read ahead takes no place from what is read ahead as well; what is needed now does.
3. A page has a place and a read, or neither. What an interrupt leaves in between, `mend` puts
   right.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

from shardkit.load.streaming.pages import Page
from shardkit.load.streaming.reader_pool import PendingRead
from shardkit.load.streaming.ring_buffer import Ring, Slot


class SlotTable:
    """Those of the pages of one stream. It has no lock: whoever uses it holds one."""

    def __init__(self, pages: Sequence[Page], ring: Ring) -> None:
        """No page has one yet."""
        self._pages = pages
        self._ring = ring
        self._clock = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the device's memory that they take now."""
        places = [page.place for page in self._pages if page.place is not None]
        return self._ring.held + sum(place.nbytes for place in places if not place.in_ring)

    def find(self, number: int, *, keep: Collection[int] = ()) -> Slot | None:
        """A place for the page *number*, taken from pages that nobody holds if need be, but not
        from those to *keep*.

        Raises:
            LoadError: there is no memory for the ring.
        """
        found = self._found(number, partial(self._may_go, keep=keep))
        if found is None and not keep:
            found = self._found(number, lambda place: self._pages[place.number].idle)
        return found

    def beside(self, number: int) -> Slot:
        """A place for it that is not in the ring.

        Raises:
            LoadError: there is no memory for it.
        """
        return self._ring.beside(number, self._pages[number].layout, self._pages[number].kept)

    def occupy(self, place: Slot, reading: PendingRead) -> None:
        """Let the page of *place* be there, as soon as *reading* is over."""
        self._clock += 1
        page = self._pages[place.number]
        page.place, page.reading, page.used, page.written, page.asked = (
            place,
            reading,
            False,
            False,
            self._clock,
        )

    def vacate(self, page: Page) -> None:
        """Take the place of *page* back."""
        place, reading = page.place, page.reading
        page.place, page.reading, page.used = None, None, False
        if reading is not None:
            reading.give_up()
        if place is not None:
            self._ring.leave(place)

    def vacate_idle(self) -> None:
        """Take back those of all pages that nobody holds, whether they are read or not."""
        for page in self._pages:
            if page.idle:
                self.vacate(page)

    def mend(self) -> None:
        """Undo what was interrupted in the middle."""
        for page in self._pages:
            beside = page.idle and page.place is not None and not page.place.in_ring
            if (beside or not page.whole) and (page.reading is None or page.reading.give_up()):
                self.vacate(page)
        self._ring.keep([page.place for page in self._pages if page.place is not None])

    def drop(self) -> None:
        """Let go of the memory of the ring, which ends with the last tensor in it."""
        self._ring.drop()

    def _found(self, number: int, may_go: Callable[[Slot], bool]) -> Slot | None:
        busy: set[Slot] = set()
        layout = self._pages[number].layout
        while found := self._ring.find(
            number, layout, lambda place: place not in busy and may_go(place)
        ):
            place, leaving = found
            for each in leaving:
                page = self._pages[each.number]
                if page.reading is not None and page.reading.give_up():
                    self.vacate(page)
                else:
                    busy.add(each)
            if busy.isdisjoint(leaving):
                self._ring.take(place, self._pages[number].kept)
                return place
        return None

    def _may_go(self, place: Slot, *, keep: Collection[int]) -> bool:
        """Whether its page was used, or nobody came for it for long."""
        page = self._pages[place.number]
        long = 4 * max(2, len(keep))
        return (
            page.idle
            and place.number not in keep
            and (page.used or self._clock - page.asked > long)
        )
