"""The ways a run ends early, each with its exit status. Anything else that escapes is a defect of ours (status 1)."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: the message is one line that says what is wrong, where, what is allowed and what to do.

    Args:
        message: The line, without `setting`.
        setting: The setting or option at fault, such as `task.data` or `--model`; the line begins with it.
    """

    exit_status = 2

    def __init__(self, message: str, setting: str | None = None):
        super().__init__(message if setting is None else f"{setting}: {message}")
        self.message, self.setting = message, setting


class DivergedError(Exception):
    """A non-finite loss or gradient: raised on every rank before the update is applied."""

    exit_status = 3


class Preempted(Exception):  # noqa: N818 - not an error: the same command continues
    """A stop signal was agreed on by all ranks and what is done is committed.

    Attributes:
        signal: its number.
    """

    exit_status = 75

    def __init__(self, message: str, signal: int):
        super().__init__(message, signal)
        self.message, self.signal = message, signal

    def __str__(self) -> str:
        return self.message


class LostRank(Exception):  # noqa: N818 - the ranks that are left are well
    """Another rank died, is stuck, or cannot be reached. The same command goes on from what is committed."""

    exit_status = 1
