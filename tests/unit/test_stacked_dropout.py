"""Which tokens the dropout of a stack of students masks, told by shapes alone; `tests/e2e/test_sweep.py` has whole trainings."""

import pytest
import torch
from torch.nn import functional as F

from pkd_dist.training.stacked_dropout import StackedDropout

LENGTHS, LONGEST, HEADS, BATCH = (3, 5), 5, 2, 4


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        ((BATCH, LONGEST, 8), (1,)),  # states
        ((BATCH, LONGEST, 5), (1,)),  # embeddings of another width, which equals the length
        ((BATCH, 1, 8), ()),  # states of a layer that computes the first token alone
        ((BATCH, 8), ()),  # what the classifier reads
        ((BATCH, HEADS, LONGEST), (2,)),  # attention weights of the first token
        ((BATCH, HEADS, LONGEST, LONGEST), (2, 3)),  # attention weights
    ],
)
def test_each_student_has_the_masks_of_its_own_length(shape, tokens):
    """In a stack, each has those that it has alone, and zeros where its batch is padded."""

    def dropped(seeds, lengths, shape):
        with StackedDropout(seeds, lengths, {8, 5}, torch.device("cpu")):
            return torch.func.vmap(lambda x: F.dropout(x, 0.5, True))(torch.ones(len(seeds), *shape))

    both = dropped((7, 8), LENGTHS, shape)
    for made, seed, length in zip(both, (7, 8), LENGTHS, strict=True):
        own = tuple(slice(length) if axis in tokens else slice(None) for axis in range(len(shape)))
        alone = dropped((seed,), (length,), made[own].shape)[0]
        assert torch.equal(made[own], alone) and 0 < int((alone != 0).sum()) < alone.numel()
        assert int((made != 0).sum()) == int((alone != 0).sum()), "zeros where it is padded"
