"""What an encoder returns.

Shapes: B examples, L tokens, C classes, M and P layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Outputs(NamedTuple):
    """What an `Encoder` returns, in the dtype of the computation.

    Attributes:
        logits_BC: Of the classifier.
        states: Hidden states of the layers asked for, of [CLS] (B, M, H), of [CLS] of each option (B, O, M, H), or of every token
            (B, L, M, H), projected to the teacher's width if the encoder has a projection; None if no layer was asked for.
        own_states: The same without the projection.
        attention: Queries, keys and values (B, L, P, 3, H) of every token in the P layers asked for; None for none.
    """

    logits_BC: torch.Tensor
    states: torch.Tensor | None
    own_states: torch.Tensor | None
    attention: torch.Tensor | None = None


Forward = Callable[..., Outputs]
"""`Encoder.forward`: an encoder, or an engine around one."""
