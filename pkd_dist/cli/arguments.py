"""An argparse action for the commands that start runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


class OneValue(argparse.Action):
    """Store the value of an option. argparse's own action silently replaces an earlier value.

    `parser.register("action", None, OneValue)` makes it the default.
    """

    _given = False

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option: str | None = None,
    ) -> None:
        if option is not None and self._given:
            parser.error(f"{option} is given twice; it takes one value")
        self._given = option is not None
        setattr(namespace, self.dest, values)
