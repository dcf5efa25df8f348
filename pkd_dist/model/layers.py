"""Which teacher layer each student layer learns from, and which layers a student is made of. Pure integer functions.

Encoder layers are counted from 1 where they are paired (layer 0 is the embedding output) and from 0 where they are
copied (`encoder.layer.I`), as in the paper's code and in its users' commands.
"""

from __future__ import annotations

from collections.abc import Sequence

from pkd_dist.errors import UserError


def paired_layers(patience: str | Sequence[int], teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """Teacher layers (from 1) for student layers 1..k-1; the student's last layer is never paired (paper, section 3.2).

    Args:
        patience: `skip` (student layer i learns from layer i * N / k, rounded), `last` (the last ones before the top),
            or the list itself.
        teacher_layers: N.
        student_layers: k.

    Raises:
        UserError: a list of the wrong length or out of range, or a student as deep as its teacher is shallow.
    """
    pairs = student_layers - 1
    if isinstance(patience, str):
        if student_layers > teacher_layers:
            raise UserError(
                f"distill.patience: {patience!r} needs a student of at most the teacher's {teacher_layers} layers, "
                f"not {student_layers}; give a list"
            )
        if patience == "skip":
            return tuple(max(1, round(i * teacher_layers / student_layers)) for i in range(1, student_layers))
        return tuple(range(teacher_layers - pairs, teacher_layers))
    if len(patience) != pairs:
        raise UserError(
            f"distill.patience: {list(patience)} names {len(patience)} teacher layer(s), but a {student_layers}-layer student "
            f"has {pairs} to pair (its last one is not paired); give {pairs}"
        )
    for layer in patience:
        if not 1 <= layer <= teacher_layers:
            raise UserError(
                f"distill.patience: layer {layer} is out of range; the teacher's layers are 1 to {teacher_layers}"
            )
    return tuple(patience)


def skip_is_rounded(teacher_layers: int, student_layers: int) -> bool:
    return teacher_layers % student_layers != 0


def copied_layers(
    layers: Sequence[int] | None, teacher_layers: int, count: int | None = None, keep_first: bool = False
) -> tuple[int, ...]:
    """Teacher layers (from 0) that a student is made of.

    Args:
        layers: as chosen; None: `count` of them at even distance, by default every second one, the last included.
        keep_first: the teacher's first layer must be the student's.

    Raises:
        UserError: out of range, more than there are, or the first one left out. (The schema checks order and repeats.)
    """
    if layers is None:
        if (count or 0) > teacher_layers:
            raise UserError(f"student.num_layers: {count} is more than the teacher's {teacher_layers} layers")
        if keep_first:
            count = count or -(-teacher_layers // 2)
            return tuple(round(i * (teacher_layers - 1) / max(1, count - 1)) for i in range(count))
        if count is None:
            return tuple(range(teacher_layers - 1, -1, -2))[::-1]
        return tuple(round((i + 1) * teacher_layers / count) - 1 for i in range(count))
    for layer in layers:
        if layer >= teacher_layers:
            raise UserError(
                f"student.layers: layer {layer} is out of range; the teacher has {teacher_layers} layers, "
                f"counted 0 to {teacher_layers - 1}"
            )
    if keep_first and layers[0] != 0:
        raise UserError(
            f"student.layers: {list(layers)} must begin with 0: this family's first layer alone has no norm before its "
            "attention, so no other layer can take its place"
        )
    return tuple(layers)
