"""Which pages of the cache belong to whom; pure bookkeeping, without torch.

A sequence takes whole pages for its prompt and the most tokens that it may get. Full pages of a
prompt are told by a hash of everything up to their end, so that another sequence with the same
beginning takes the same pages, and nobody writes into them again. Pages that nobody holds stay
until they are needed for something else, the longest unused first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """What a sequence holds.

    Attributes:
        pages: In order of positions.
        known_tokens: So many tokens of the prompt have keys and values there already, or will have
            them before this sequence is computed.
    """

    pages: tuple[int, ...]
    known_tokens: int


class PagePool:
    """Hands out pages 0 to count - 1.

    Args:
        count: Pages in all.
        page_size: Positions of a page.
    """

    def __init__(self, count: int, page_size: int) -> None:
        self.count, self.page_size = count, page_size
        self._free = list(range(count))[::-1]
        self._holders = [0] * count
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # named pages that nobody holds

    def grow(self, count: int) -> None:
        """Have so many pages in all; those there are stay what they are."""
        self._free = [*range(self.count, count)][::-1] + self._free
        self._holders += [0] * (count - self.count)
        self.count = count

    @property
    def available(self) -> int:
        """Pages that nobody holds."""
        return len(self._free) + len(self._unused)

    def pages_for(self, tokens: int) -> int:
        """How many pages so many tokens take."""
        return -(-tokens // self.page_size)

    def lease(self, prompt: Sequence[int], tokens: int, owner: str | None) -> Lease | None:
        """Pages for a prompt and what may follow it; None when there are not enough.

        The last token of a prompt is never taken as known: its logits are wanted.

        Args:
            prompt: Token ids.
            tokens: Prompt and completion at most.
            owner: Whose keys and values these are: the adapter's name.
        """
        names = self._names(prompt, owner)
        shareable = names[: (len(prompt) - 1) // self.page_size]
        shared: list[int] = []
        for name in shareable:
            page = self._page_of.get(name)
            if page is None:
                break
            shared.append(page)
        own = self.pages_for(tokens) - len(shared)
        if own > self.available - sum(page in self._unused for page in shared):
            return None
        for page in shared:
            self._hold(page)
        pages = [*shared, *(self._take() for _ in range(own))]
        for name, page in zip(names, pages, strict=False):
            if name not in self._page_of:
                self._page_of[name], self._name_of[page] = page, name
        return Lease(tuple(pages), len(shared) * self.page_size)

    def fork(self, lease: Lease, prompt_tokens: int, tokens: int) -> Lease | None:
        """Pages for another sequence with the same prompt; None when there are not enough.

        All full pages of the prompt are shared, whoever named them; what lies in a last page that
        is not full has to be copied from the first lease's.
        """
        full = prompt_tokens // self.page_size
        own = self.pages_for(tokens) - full
        if own > self.available:
            return None
        for page in lease.pages[:full]:
            self._hold(page)
        return Lease((*lease.pages[:full], *(self._take() for _ in range(own))), prompt_tokens)

    def release(self, lease: Lease) -> None:
        """Give a lease back."""
        for page in reversed(lease.pages):  # the beginning of a prompt is the last to be lost
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._name_of:
                self._unused[page] = None
            else:
                self._free.append(page)

    def forget(self) -> None:
        """No page is known any more, as after a change of weights; leases stay."""
        self._free += self._unused
        self._unused.clear()
        self._page_of.clear()
        self._name_of.clear()

    def _names(self, prompt: Sequence[int], owner: str | None) -> list[bytes]:
        """Of the prompt's full pages, each standing for everything up to its end."""
        digest = hashlib.blake2b(repr(owner).encode(), digest_size=16)
        names: list[bytes] = []
        for end in range(self.page_size, len(prompt) + 1, self.page_size):
            page = prompt[end - self.page_size : end]
            digest.update(b"".join(token.to_bytes(8, "little") for token in page))
            names.append(digest.digest())
        return names

    def _hold(self, page: int) -> None:
        self._holders[page] += 1
        self._unused.pop(page, None)

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            del self._page_of[self._name_of.pop(page)]
        self._holders[page] += 1
        return page
