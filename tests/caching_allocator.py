"""PyTorch's caching allocator without a device: whether what a pass asks for finds room, in pieces as they come.

Source: PyTorch 2.11, `c10/cuda/CUDACachingAllocator.cpp` (its constants, its order of attempts). Memory is of one
stream.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

MIB = 2**20
UNIT = 512
SMALL = MIB  # what is no larger comes from small segments
SMALL_SEGMENT, MIDDLE_SEGMENT, LARGE_UNIT = 2 * MIB, 20 * MIB, 2 * MIB
LARGE = 10 * MIB  # what is larger has a segment of its own size


class NoRoom(Exception):
    """A request for which nothing is left, even after all free segments were given back."""


class Recording:
    """What was asked for and given back, in order, to be asked for again of allocators."""

    def __init__(self) -> None:
        self._asked: list[tuple[int, bool]] = []  # bytes, and whether who asks goes on without them
        self._steps: list[int | None] = []  # the next request, or which one was given back

    def malloc(self, nbytes: int, may_be_refused: bool = False) -> int:
        self._asked.append((nbytes, may_be_refused))
        self._steps.append(None)
        return len(self._asked) - 1

    def free(self, number: int) -> None:
        self._steps.append(number)

    @property
    def num_refusable(self) -> int:
        """How many requests may be refused."""
        return sum(may_be_refused for _, may_be_refused in self._asked)

    def ask(self, allocator: CachingAllocator) -> None:
        """NoRoom where it has none."""
        pieces: list[Piece | None] = []
        for step in self._steps:
            if step is None:
                nbytes, may_be_refused = self._asked[len(pieces)]
                try:
                    pieces.append(allocator.malloc(nbytes))
                except NoRoom:
                    if not may_be_refused:
                        raise
                    pieces.append(None)
            elif (piece := pieces[step]) is not None:
                allocator.free(piece)


@dataclass(eq=False)
class Piece:
    """Part of a segment."""

    segment: Segment
    offset: int
    nbytes: int
    free: bool = True


@dataclass(eq=False)
class Segment:
    """What the driver gave at once; with expandable segments a range of addresses that is not all there."""

    pool: Pool
    pieces: list[Piece] = field(default_factory=list)


@dataclass(eq=False)
class Pool:
    """Segments of small pieces, or of large ones."""

    small: bool
    segments: list[Segment] = field(default_factory=list)


def rounded(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit


class CachingAllocator:
    """`malloc` and `free` in at most `limit` bytes of the driver's; NoRoom where PyTorch would say out of memory."""

    def __init__(self, limit: int):
        self.limit = limit
        self.reserved = self.peak = self.flushes = 0
        self._pools = {small: Pool(small) for small in (True, False)}

    def malloc(self, nbytes: int) -> Piece:
        nbytes = max(UNIT, rounded(nbytes, UNIT))
        pool = self._pools[nbytes <= SMALL]
        piece = self._best(pool, nbytes) or self._grown(pool, nbytes)
        if piece is None:
            self.flushes += 1
            self.give_back()
            piece = self._grown(pool, nbytes)
        if piece is None:
            raise NoRoom(f"{nbytes / MIB:.1f} MiB; {self.reserved / MIB:.1f} of {self.limit / MIB:.1f} are taken")
        self._split(piece, nbytes)
        piece.free = False
        return piece

    def free(self, piece: Piece) -> None:
        piece.free = True
        pieces = piece.segment.pieces
        at = pieces.index(piece)
        for neighbour in (at + 1, at - 1):
            if 0 <= neighbour < len(pieces) and pieces[neighbour].free and self._join(pieces[neighbour], piece):
                del pieces[neighbour]

    def give_back(self) -> None:
        """All segments that are free as a whole."""
        for pool in self._pools.values():
            kept = [segment for segment in pool.segments if not all(piece.free for piece in segment.pieces)]
            self.reserved -= sum(p.nbytes for s in pool.segments if s not in kept for p in s.pieces)
            pool.segments = kept

    def _best(self, pool: Pool, nbytes: int) -> Piece | None:
        """The smallest free piece that is large enough."""
        fitting = (p for s in pool.segments for p in s.pieces if p.free and p.nbytes >= nbytes)
        return min(fitting, key=lambda piece: piece.nbytes, default=None)

    def _grown(self, pool: Pool, nbytes: int) -> Piece | None:
        """A piece of memory that the driver gives now."""
        size = asked_of_driver(nbytes)
        if self.reserved + size > self.limit:
            return None
        segment = Segment(pool)
        segment.pieces.append(Piece(segment, 0, size))
        pool.segments.append(segment)
        self._reserve(size)
        return segment.pieces[0]

    def _reserve(self, nbytes: int) -> None:
        self.reserved += nbytes
        self.peak = max(self.peak, self.reserved)

    def _split(self, piece: Piece, nbytes: int) -> None:
        rest = piece.nbytes - nbytes
        if rest < UNIT or not (piece.segment.pool.small or rest > SMALL):
            return
        pieces = piece.segment.pieces
        pieces.insert(pieces.index(piece) + 1, Piece(piece.segment, piece.offset + nbytes, rest))
        piece.nbytes = nbytes

    @staticmethod
    def _join(one: Piece, other: Piece) -> bool:
        other.offset = min(one.offset, other.offset)
        other.nbytes += one.nbytes
        return True


def asked_of_driver(nbytes: int) -> int:
    """Bytes of the segment that is made for a request."""
    if nbytes <= SMALL:
        return SMALL_SEGMENT
    return MIDDLE_SEGMENT if nbytes < LARGE else rounded(nbytes, LARGE_UNIT)


class ExpandableAllocator(CachingAllocator):
    """The same with `expandable_segments`: each pool is one range of addresses, of which pages are there or not."""

    def __init__(self, limit: int):
        super().__init__(limit)
        self._pages: dict[Pool, set[int]] = {}
        for pool in self._pools.values():
            pool.segments.append(Segment(pool))
            self._pages[pool] = set()

    def _page(self, pool: Pool) -> int:
        return SMALL_SEGMENT if pool.small else MIDDLE_SEGMENT

    def give_back(self) -> None:
        """All pages that are free as a whole."""
        for pool in self._pools.values():
            segment, page = pool.segments[0], self._page(pool)
            used = {
                number
                for piece in segment.pieces
                if not piece.free
                for number in range(piece.offset // page, -(-(piece.offset + piece.nbytes) // page))
            }
            gone = self._pages[pool] - used
            self._pages[pool] -= gone
            self.reserved -= len(gone) * page
            kept: list[Piece] = []
            for piece in segment.pieces:
                if piece.free:
                    kept += self._there(pool, piece)
                else:
                    kept.append(piece)
            segment.pieces = kept

    def _there(self, pool: Pool, piece: Piece) -> list[Piece]:
        """What of a free piece has pages."""
        page, left = self._page(pool), []
        at, end = piece.offset, piece.offset + piece.nbytes
        while at < end:
            stop = min(end, (at // page + 1) * page)
            if at // page in self._pages[pool]:
                if left and left[-1].offset + left[-1].nbytes == at:
                    left[-1].nbytes += stop - at
                else:
                    left.append(Piece(piece.segment, at, stop - at))
            at = stop
        return left

    def _grown(self, pool: Pool, nbytes: int) -> Piece | None:
        if self.reserved + asked_of_driver(nbytes) > self.limit:
            return None
        segment, page = pool.segments[0], self._page(pool)
        first, free_piece = self._place(segment, nbytes)
        pages = set(range(first // page, -(-(first + nbytes) // page))) - self._pages[pool]
        if self.reserved + len(pages) * page > self.limit:
            return None
        self._pages[pool] |= pages
        self._reserve(len(pages) * page)
        # all of its pages that nobody has are free now
        neighbours = [p for p in segment.pieces if p.free and p is not free_piece]
        taken = sorted((p.offset, p.offset + p.nbytes) for p in segment.pieces if not p.free)
        segment.pieces = [p for p in segment.pieces if not p.free]
        made: list[Piece] = []
        for number in sorted(self._pages[pool]):
            self._add_free(made, segment, number * page, (number + 1) * page, taken)
        del neighbours
        for piece in made:
            insort(segment.pieces, piece, key=lambda p: p.offset)
        return self._best(pool, nbytes)

    @staticmethod
    def _add_free(made: list[Piece], segment: Segment, at: int, end: int, taken: list[tuple[int, int]]) -> None:
        """The bytes from `at` to `end` that are not taken."""
        for first, last in [*taken, (end, end)]:
            stop = min(first, end)
            if at < stop:
                if made and made[-1].offset + made[-1].nbytes == at:
                    made[-1].nbytes += stop - at
                else:
                    made.append(Piece(segment, at, stop - at))
            at = max(at, min(last, end))

    def _place(self, segment: Segment, nbytes: int) -> tuple[int, Piece | None]:
        """The first address from which so many bytes are nobody's, and the free piece that begins there."""
        at = 0
        for piece in segment.pieces:
            if piece.free:
                continue
            if piece.offset - at >= nbytes:
                break
            at = piece.offset + piece.nbytes
        return at, next((p for p in segment.pieces if p.free and p.offset == at), None)

    @staticmethod
    def _join(one: Piece, other: Piece) -> bool:
        first, second = sorted((one, other), key=lambda piece: piece.offset)
        if first.offset + first.nbytes != second.offset:
            return False
        return CachingAllocator._join(one, other)
