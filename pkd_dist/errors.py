"""The ways a run ends early, each with its exit status. Anything else that escapes is a defect of ours (status 1)."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: the message is one line that says what is wrong, where, what is allowed and what to do."""

    exit_status = 2


class DivergedError(Exception):
    """A non-finite loss or gradient: raised on every rank before the update is applied."""

    exit_status = 3


class Preempted(Exception):  # noqa: N818 - not an error: the same command continues
    """A stop signal was agreed on by all ranks and a checkpoint is committed."""

    exit_status = 75
