"""The page pool: who owns which page, and which full pages hold what a new request begins with.

A page is free, owned by as many requests as `references` says, or idle: owned by nobody, but its content has a name and
may be asked for. Idle pages are handed out when none is free, the one idle for longest first.
"""

from collections import OrderedDict
import hashlib

import numpy as np


def block_names(tokens: list[int], page_size: int, known: list[bytes] = ()) -> list[bytes]:
    """The name of each full page of a sequence: a hash of its tokens and of all before them. `known` are the first."""
    names = list(known)
    for end in range((len(names) + 1) * page_size, len(tokens) + 1, page_size):
        block = np.asarray(tokens[end - page_size : end], np.int64).tobytes()
        names.append(hashlib.blake2b((names[-1] if names else b"") + block, digest_size=16).digest())
    return names


class PagePool:
    """Pages 0 to num_pages - 1."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self.free = list(reversed(range(num_pages)))
        self.references = [0] * num_pages
        self.idle: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """How many pages `allocate` can still give."""
        return len(self.free) + len(self.idle)

    def allocate(self) -> int | None:
        """A page with one owner and no name; None if all are owned."""
        if self.free:
            page = self.free.pop()
        elif self.idle:
            page, _ = self.idle.popitem(last=False)
            del self._page_of[self._name_of.pop(page)]
        else:
            return None
        self.references[page] = 1
        return page

    def find(self, names: list[bytes]) -> list[int]:
        """The pages of as many of the first blocks as the pool holds, nobody's owner yet."""
        pages = []
        for name in names:
            if name not in self._page_of:
                break
            pages.append(self._page_of[name])
        return pages

    def share(self, page: int) -> None:
        """One more owner for a page that `find` gave."""
        self.idle.pop(page, None)
        self.references[page] += 1

    def publish(self, page: int, name: bytes) -> None:
        """Says what a full page holds, from when on it must not be written. The first page of a name keeps it."""
        if name not in self._page_of and page not in self._name_of:
            self._page_of[name], self._name_of[page] = page, name

    def release(self, page: int) -> None:
        """One owner less."""
        self.references[page] -= 1
        if self.references[page] == 0:
            if page in self._name_of:
                self.idle[page] = None
            else:
                self.free.append(page)
