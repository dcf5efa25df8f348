"""The layer maps of a run: which layers are paired, which a cache keeps, which a student is made of. No model is needed.

Layers are counted from 1 where they are paired or cached (0 is the embedding output), and from 0 where they are copied
(`encoder.layer.I`), as in the code of the PKD authors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pkd_dist.config.distill import Distill
from pkd_dist.config.schema import Cache
from pkd_dist.errors import UserError


@dataclass(frozen=True)
class LayerMap:
    """The layers that a loss compares: pairs of (student layer, teacher layer), counted from 1 (0: the embeddings).

    Attributes:
        pairs: of hidden states.
        attention: of queries, keys and values; the last pair is that of the relations.
    """

    pairs: tuple[tuple[int, int], ...] = ()
    attention: tuple[tuple[int, int], ...] = ()

    @property
    def teacher_states(self) -> tuple[int, ...]:
        """The teacher layers whose hidden states are needed: the paired ones in their order, then other inputs of attention."""
        return tuple(
            dict.fromkeys([teacher for _, teacher in self.pairs] + [teacher - 1 for _, teacher in self.attention])
        )

    @property
    def attention_inputs(self) -> tuple[int, ...]:
        """For each pair of `attention`, the position of the teacher layer's input in `teacher_states`."""
        return tuple(self.teacher_states.index(teacher - 1) for _, teacher in self.attention)


def layer_map(distill: Distill, teacher_layers: int, student_layers: int) -> LayerMap:
    """Return the layers that the loss of a run compares.

    Raises:
        UserError: see `patience_pairs` and `attention_pairs`.
    """
    return LayerMap(
        patience_pairs(distill, teacher_layers, student_layers),
        attention_pairs(distill, teacher_layers, student_layers),
    )


def attention_pairs(distill: Distill, teacher_layers: int, student_layers: int) -> tuple[tuple[int, int], ...]:
    """Return the (student layer, teacher layer) pairs of queries, keys and values, counted from 1; the last is the relations'.

    Empty if neither relations nor attention scores have a weight.

    Raises:
        UserError: see `paired_layers`; or `distill.relation_layer` is out of range.
    """
    if not distill.compares_attention:
        return ()
    top = distill.relation_layer or teacher_layers
    if top > teacher_layers:
        raise UserError(
            f"distill.relation_layer: {top} is out of range; the teacher's layers are 1 to {teacher_layers}"
        )
    below: tuple[int, ...] = ()
    if distill.attention:
        paired = paired_layers(distill.patience, teacher_layers, student_layers, distill.pair_last_layer)
        below = paired[: student_layers - 1]
    return (*enumerate(below, start=1), (student_layers, top))


def patience_pairs(distill: Distill, teacher_layers: int, student_layers: int) -> tuple[tuple[int, int], ...]:
    """Return the (student layer, teacher layer) pairs of hidden states, counted from 1; (0, 0) pairs the embeddings.

    Empty if neither the patience term nor Gram matrices have a weight.

    Raises:
        UserError: see `paired_layers`; or there is no layer for Gram matrices.
    """
    if not (distill.beta or distill.gram):
        return ()
    paired = paired_layers(distill.patience, teacher_layers, student_layers, distill.pair_last_layer)
    pairs = (*([(0, 0)] if distill.pair_embeddings else []), *enumerate(paired, start=1))
    if distill.gram and not pairs:
        raise UserError(
            "distill.gram: a student of one layer has none to compare; set distill.pair_last_layer=true, or distill.gram=0"
        )
    return pairs


def kept_layers(cache: Cache, needed: Sequence[int], teacher_layers: int) -> tuple[int, ...]:
    """Return the teacher layers, ascending from 0 (the embeddings), whose states a new cache stores.

    Args:
        cache: The `cache` section of the run.
        needed: `LayerMap.teacher_states`.
        teacher_layers: Number of teacher layers.

    Raises:
        UserError: `cache.layers` lacks a layer that is needed, or names one that does not exist.
    """
    given = cache.layers
    kept = set(needed) if given is None else set(range(teacher_layers + 1)) if given == "all" else set(given)
    if lacking := set(needed) - kept:
        raise UserError(
            f"cache.layers: {given} lacks teacher layer {min(lacking)}, which the loss compares; add it, or use 'all'"
        )
    if max(kept, default=0) > teacher_layers:
        raise UserError(f"cache.layers: {max(kept)} is out of range; the teacher has {teacher_layers} layers")
    return tuple(sorted(kept))


def paired_layers(
    patience: str | Sequence[int], teacher_layers: int, student_layers: int, pair_last_layer: bool = False
) -> tuple[int, ...]:
    """Return the teacher layers (from 1) for student layers 1..k-1, or 1..k (PKD, section 3.2, leaves the last one out).

    Args:
        patience: `skip` (student layer i learns from layer i * N / k, rounded), `last` (the teacher's last layers, without
            the very last unless `pair_last_layer`), or the list itself.
        teacher_layers: N.
        student_layers: k.
        pair_last_layer: Also pair the student's layer k.

    Raises:
        UserError: The list has the wrong length or a layer out of range, or `skip` or `last` is used with a student
            deeper than its teacher.
    """
    count = student_layers if pair_last_layer else student_layers - 1
    if isinstance(patience, str):
        if student_layers > teacher_layers:
            raise UserError(
                f"distill.patience: {patience!r} needs a student of at most the teacher's {teacher_layers} layers, "
                f"not {student_layers}; give a list"
            )
        if patience == "skip":
            return tuple(max(1, round(i * teacher_layers / student_layers)) for i in range(1, count + 1))
        top = teacher_layers if pair_last_layer else teacher_layers - 1
        return tuple(range(top - count + 1, top + 1))
    if len(patience) != count:
        last = "" if pair_last_layer else " (its last layer is paired only with distill.pair_last_layer=true)"
        raise UserError(
            f"distill.patience: {list(patience)} names {len(patience)} teacher layer(s), but a {student_layers}-layer student "
            f"has {count} to pair{last}; give {count}"
        )
    for layer in patience:
        if not 1 <= layer <= teacher_layers:
            raise UserError(
                f"distill.patience: layer {layer} is out of range; the teacher's layers are 1 to {teacher_layers}"
            )
    return tuple(patience)


def skip_is_rounded(teacher_layers: int, student_layers: int) -> bool:
    """Return whether `skip` rounds: the student's depth does not divide the teacher's."""
    return teacher_layers % student_layers != 0


def copied_layers(
    layers: Sequence[int] | None, teacher_layers: int, count: int | None = None, keep_first: bool = False
) -> tuple[int, ...]:
    """Return the teacher layers (from 0) that a student is made of.

    Args:
        layers: The user's choice, already increasing; None takes `count` layers at even distance, by default every
            second one, including the last.
        teacher_layers: Number of teacher layers.
        count: Number of student layers.
        keep_first: The student must start with the teacher's first layer.

    Raises:
        UserError: A layer is out of range, `count` exceeds the teacher's layers, or the first layer is missing.
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
            f"student.layers: {list(layers)} must begin with 0: only the first layer of this family has no norm before its "
            "attention, so no other layer can take its place"
        )
    return tuple(layers)
