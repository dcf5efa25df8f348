"""How the text columns of a multiple-choice example become the pairs of texts that a model reads, one for each option.

    context, question, option 1, ..., option C  ->  (context, question + option 1), ..., (context, question + option C)

Shapes: B examples, C options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Choices:
    """The columns of such an example: its context, its question if it has one, and its options.

    Attributes:
        question: Whether there is a question.
        gap: Text in the question whose place the option takes; None: the option follows the question.
    """

    question: bool
    gap: str | None = None

    def count(self, columns: Sequence[object]) -> int:
        """Return the number of options C of examples with these columns, or of an example with these texts."""
        return len(columns) - 1 - self.question

    def options(self, columns: Sequence[T]) -> Sequence[T]:
        """Return the columns of the options, or of the columns of one example its options."""
        return columns[1 + self.question :]

    def pairs(self, columns: Sequence[Sequence[str]]) -> list[list[str]]:
        """Return both texts of each pair, two lists of B * C texts: the options of an example follow each other.

        Args:
            columns: Each of B texts.
        """
        contexts: list[str] = []
        seconds: list[str] = []
        for fields in zip(*columns, strict=True):
            options = self.options(fields)
            contexts += [fields[0]] * len(options)
            seconds += [self._second(fields[1], option) for option in options] if self.question else options
        return [contexts, seconds]

    def _second(self, question: str, option: str) -> str:
        if self.gap is not None and self.gap in question:
            return question.replace(self.gap, option)
        return f"{question} {option}" if question else option
