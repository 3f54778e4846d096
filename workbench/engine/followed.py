"""Where the tokens of a step stand, for drafters that follow the target."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.slots.drafter import FollowedStep


class FollowedPlaces:
    """By request of the last step, which of its tokens are the request's."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[int, int]] = {}  # a token, and its position

    def note(self, step: FollowedStep) -> None:
        """Take the places of a step; those of the one before are void."""
        batch, first = step.batch, 0
        self._first = {}
        for request_id, count, end in zip(
            step.request_ids, batch.query_lens_host, batch.seq_lens_host, strict=True
        ):
            self._first[request_id] = (first, end - count)
            first += count

    def before_last(self, request_id: str, num_known: int) -> int | None:
        """Token of the step behind which a request's last known token was drawn; None where the
        request had no part in it."""
        found = self._first.get(request_id)
        return None if found is None else found[0] + num_known - 2 - found[1]

    def all_before_last(
        self, request_ids: Sequence[str], num_known: Sequence[int]
    ) -> list[int | None]:
        """The same of several requests."""
        return [self.before_last(*pair) for pair in zip(request_ids, num_known, strict=True)]

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._first.pop(request_id, None)
