"""The ways a run ends early, each with its exit status. Any other exception is a bug in this package (status 1)."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one line: the value, where it is, what is allowed, and the remedy.

    Args:
        message: the line, without `where` and `setting`.
        setting: the setting or option at fault, such as `task.data` or `--model`.
        where: where it was set, such as `run.yaml:3`; the line begins with it, then names the setting.
    """

    exit_status = 2

    def __init__(self, message: str, setting: str | None = None, where: str | None = None):
        super().__init__(": ".join(part for part in (where, setting, message) if part))
        self.message, self.setting = message, setting


class FullDiskError(UserError):
    """A disk or quota is full; the message names the folder."""


class DivergedError(Exception):
    """A loss or gradient is not finite. Raised on every rank before the update is applied."""

    exit_status = 3


class Preempted(Exception):  # noqa: N818 - not an error: rerun the same command to resume
    """All ranks agreed on a stop signal, and finished work is committed.

    Attributes:
        signal: number of the signal.
    """

    exit_status = 75

    def __init__(self, message: str, signal: int):
        super().__init__(message, signal)
        self.message, self.signal = message, signal

    def __str__(self) -> str:
        return self.message


class LostRank(Exception):  # noqa: N818 - not an error of this rank
    """Another rank died, hangs, or cannot be reached. Rerun the same command to resume."""

    exit_status = 1
