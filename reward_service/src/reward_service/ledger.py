"""Settling replies: charged, kept and audited together, on disk before they are sent.

The order makes every crash harmless: charges and replies are prepared in a transaction, the audit is written,
the transaction is committed, the replies go out. So nothing is answered or charged that the audit does not
show, and a request whose reply got lost finds it kept; or, if the crash came before the commit, is scored
once more and charged for the first time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from reward_service.audit import AuditFile, AuditUnavailable, Value
from reward_service.group_commit import GroupCommit
from reward_service.state import Claim, Outcome, State, StateUnavailable

logger = logging.getLogger(__name__)


class Entry(NamedTuple):
    """What the audit says of a request; and the claim, unless an earlier reply is sent again, or `event` says
    what else there is to record."""

    about: Mapping[str, Value]
    claim: Claim | None
    event: str = "repeat"


class Ledger:
    """Settles many entries in one commit."""

    def __init__(self, audit: AuditFile, state: State) -> None:
        self._audit = audit
        self._state = state
        self._commits = GroupCommit(self.write)

    def start(self) -> None:
        """Start the committing thread."""
        self._commits.start()

    def stop(self) -> None:
        """Settle what waits, then end the thread and close the files."""
        self._commits.stop()
        self._audit.close()
        self._state.close()

    async def settle(self, entry: Entry) -> Outcome:
        """The outcome of `entry`, once it is on disk.

        Raises:
            AuditUnavailable, StateUnavailable: nothing may be sent.
        """
        return await self._commits.commit(entry)

    async def writable(self) -> bool:
        """Whether the audit can be written. After a failed write this tries a line, `resumed`."""
        if not self._audit.healthy:
            with suppress(AuditUnavailable, StateUnavailable):
                await self.settle(Entry({}, None, "resumed"))
        return self._audit.healthy

    def write(self, entries: Sequence[Entry]) -> list[Outcome]:
        """One outcome an entry, all in one transaction. What only repeats needs no transaction."""
        if all(entry.claim is None for entry in entries):
            outcomes = [Outcome(b"", 0)] * len(entries)
            self._record(entries, outcomes)
            return outcomes
        with self._state.settling() as settlement:
            settled = iter(settlement.settle_all([entry.claim for entry in entries if entry.claim]))
            outcomes = [Outcome(b"", 0) if entry.claim is None else next(settled) for entry in entries]
            self._record(entries, outcomes)
        if self._state.too_full:
            try:
                self._state.prune()
            except StateUnavailable:
                logger.warning("old replies could not be dropped")
        return outcomes

    def _record(self, entries: Sequence[Entry], outcomes: Sequence[Outcome]) -> None:
        self._audit.append(
            [
                {"event": _event(entry, outcome), **entry.about, "cost": outcome.charged}
                for entry, outcome in zip(entries, outcomes, strict=True)
            ]
        )


def _event(entry: Entry, outcome: Outcome) -> str:
    if outcome.problem is not None:
        return "withheld"  # scored, but the budget or another request with the same key was first
    return entry.event if entry.claim is None else "score"
