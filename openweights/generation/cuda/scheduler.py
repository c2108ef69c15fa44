"""Who computes what next: waiting requests, prompts in slices, rows that decode; without torch.

Requests are taken in their order as soon as a row and pages for everything they may need are free,
so that nothing that has begun ever has to give way. A request's samples begin together where rows
are free for them: the first computes the prompt, the others fork from it. Samples that begin later
find the prompt's full pages in the pool.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from openweights.generation.cuda.pages import Lease, PagePool


@dataclass(frozen=True, slots=True)
class Work:
    """A request as far as scheduling goes.

    Attributes:
        id: Of the request.
        prompt: Token ids.
        samples: How many completions.
        tokens: Prompt and completion at most.
        owner: Its adapter.
    """

    id: str
    prompt: Sequence[int]
    samples: int
    tokens: int
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """A sample that has a row and its pages."""

    work: Work
    sample: int
    row: int
    lease: Lease


@dataclass(frozen=True, slots=True)
class Slice:
    """Positions `start` to `stop` of a member's prompt, to be computed now.

    Attributes:
        starts: Members whose decoding begins with it: the one that computed the prompt and its
            forks; none while the prompt goes on.
        copies: (from, to) pages that the forks need a copy of first.
    """

    member: Member
    start: int
    stop: int
    starts: tuple[Member, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class _Prompt:
    """A prompt that is being computed for its members, how far it is, and whether anybody wants it
    still."""

    members: list[Member]
    done: int
    is_dropped: bool = False


@dataclass(slots=True)
class _Waiting:
    work: Work
    begun: int = 0


@dataclass(slots=True)
class Scheduler:
    """Gives rows and pages to requests.

    Args:
        pool: The cache's pages.
        rows: How many samples may be worked on at a time.
    """

    pool: PagePool
    rows: int
    _waiting: deque[_Waiting] = field(default_factory=deque[_Waiting])
    _prompts: deque[_Prompt] = field(default_factory=deque[_Prompt])
    _running: dict[int, Member] = field(default_factory=dict[int, Member])
    _free_rows: list[int] = field(default_factory=list[int])

    def __post_init__(self) -> None:
        self._free_rows = list(range(self.rows))[::-1]

    @property
    def running(self) -> list[Member]:
        """Members that decode, by row."""
        return [self._running[row] for row in sorted(self._running)]

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, is computed or decodes."""
        return not (self._waiting or self._prompts or self._running)

    @property
    def waits(self) -> bool:
        """Whether any sample has no row yet."""
        return bool(self._waiting)

    @property
    def lacked_pages(self) -> int:
        """How many pages more would let waiting samples take all rows that are free now, where
        they wait for pages alone (after `admit`).
        """
        needs = [
            self.pool.pages_for(waiting.work.tokens)
            for waiting in self._waiting
            for _ in range(waiting.work.samples - waiting.begun)
        ]
        return max(0, sum(needs[: len(self._free_rows)]) - self.pool.available)

    @property
    def computing(self) -> int:
        """Members whose prompts are not computed yet."""
        return sum(len(prompt.members) for prompt in self._prompts)

    def submit(self, work: Work) -> None:
        """Take a request.

        Raises:
            ValueError: It would not fit into the whole pool.
        """
        if self.pool.pages_for(work.tokens) > self.pool.count:
            raise ValueError(f"{work.tokens} tokens do not fit into the cache")
        self._waiting.append(_Waiting(work))

    def admit(self) -> list[Member]:
        """Give rows and pages to as many waiting samples as there are for, in their order."""
        admitted: list[Member] = []
        while self._waiting and self._free_rows:
            members = self._begin(self._waiting[0])
            if not members:
                break
            admitted += members
            self._prompts.append(_Prompt(members, members[0].lease.known_tokens))
            if self._waiting[0].begun == self._waiting[0].work.samples:
                self._waiting.popleft()
        return admitted

    def _begin(self, waiting: _Waiting) -> list[Member]:
        """As many of a request's samples as fit: the first with a lease, the others forked."""
        work = waiting.work
        members: list[Member] = []
        while waiting.begun < work.samples and self._free_rows:
            if members:
                lease = self.pool.fork(members[0].lease, len(work.prompt), work.tokens)
            else:
                lease = self.pool.lease(work.prompt, work.tokens, work.owner)
            if lease is None:
                break
            members.append(Member(work, waiting.begun, self._free_rows.pop(), lease))
            waiting.begun += 1
        return members

    def slices(self, budget: int) -> list[Slice]:
        """What to compute of the prompts next, in their order: at most `budget` tokens in all."""
        slices: list[Slice] = []
        while self._prompts and budget > 0:
            prompt = self._prompts[0]
            first = prompt.members[0]
            start, length = prompt.done, len(first.work.prompt)
            stop = min(length, start + budget)
            budget -= stop - start
            prompt.done = stop
            if stop < length:
                slices.append(Slice(first, start, stop))
                break
            self._prompts.popleft()
            slices.append(self._started(prompt, start))
        return slices

    def _started(self, prompt: _Prompt, start: int) -> Slice:
        """The last slice of a prompt: its members decode from now on."""
        first, *forks = prompt.members
        length = len(first.work.prompt)
        tail = length // self.pool.page_size
        copies = [(first.lease.pages[tail], m.lease.pages[tail]) for m in forks]
        if length % self.pool.page_size == 0:
            copies = []
        if prompt.is_dropped:
            for member in prompt.members:
                self._release(member)
            return Slice(first, start, length)
        self._running |= {member.row: member for member in prompt.members}
        return Slice(first, start, length, tuple(prompt.members), tuple(copies))

    def finish(self, member: Member) -> None:
        """A member needs nothing any more."""
        del self._running[member.row]
        self._release(member)

    def _release(self, member: Member) -> None:
        self.pool.release(member.lease)
        self._free_rows.append(member.row)

    def abort(self, work_id: str) -> None:
        """Drop a request.

        A prompt that is being computed is computed to its end: others may share its pages.
        """
        self._waiting = deque(w for w in self._waiting if w.work.id != work_id)
        for member in [m for m in self._running.values() if m.work.id == work_id]:
            self.finish(member)
        for prompt in self._prompts:
            prompt.is_dropped = prompt.is_dropped or prompt.members[0].work.id == work_id
        if self._prompts and all(prompt.is_dropped for prompt in self._prompts):
            self._drop_prompts()

    def _drop_prompts(self) -> None:
        """Nobody wants a prompt that is being computed: what is known of them is not there."""
        for prompt in self._prompts:
            for member in prompt.members:
                self._release(member)
        self._prompts.clear()
        self.pool.forget()
