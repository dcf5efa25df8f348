"""The loss of Patient Knowledge Distillation (Sun et al. 2019, arXiv:1908.09355), as pure tensor functions.

    L = (1 - alpha) * CE + alpha * DS + beta * PT                                    (section 3.3, equation 8)

and of later work, which adds terms with weights of their own: Gram matrices, relations, attention scores.

Every function returns one value per example, and the caller averages over the global batch. This keeps the sum over
micro-batches and ranks exact. States of all tokens are averaged within each example first, so that short and long examples
have equal weight; TextBrewer and the OneFlow reference average over all tokens of the batch instead. All losses are
computed in float32 or wider, whatever the dtype of the model.

Shapes (suffixes of names, see docs/architecture.md): B examples, C classes, M patience pairs, H hidden size, L tokens,
P layers whose attention is compared, A heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def hard_loss(
    logits_BC: torch.Tensor, labels_B: torch.Tensor, class_weights_C: torch.Tensor | None = None
) -> torch.Tensor:
    """Return CE (B,): cross-entropy with the gold labels, or the squared error for a regression (C = 1).

    Where a text can have several classes, each is a decision of its own: CE is the mean of their binary cross-entropies.

    Args:
        logits_BC: student logits.
        labels_B: class indices, floats for a regression, or (B, C) floats of 0 and 1 for several classes. Examples labeled -1 or
            NaN are unlabeled: their loss is 0.
        class_weights_C: factor of the cross-entropy for each true class.
    """
    logits_BC = _wide(logits_BC)
    if labels_B.ndim == 2:
        targets_BC = labels_B.nan_to_num().to(logits_BC.dtype)
        ce_B = F.binary_cross_entropy_with_logits(logits_BC, targets_BC, reduction="none").mean(dim=-1)
        return ce_B.masked_fill(labels_B[:, 0].isnan(), 0.0)
    if labels_B.is_floating_point():
        error_B = (logits_BC.squeeze(-1) - labels_B.nan_to_num()).square()
        return error_B.masked_fill(labels_B.isnan(), 0.0)
    if class_weights_C is not None:
        class_weights_C = class_weights_C.to(logits_BC)
    return F.cross_entropy(logits_BC, labels_B, class_weights_C, ignore_index=-1, reduction="none")


def soft_loss(
    student_BC: torch.Tensor, teacher_BC: torch.Tensor, temperature: float, reduction: str = "batchmean"
) -> torch.Tensor:
    """Return DS (B,): the distance from the teacher's softened predictions (section 3.1, equation 3).

    A regression (C = 1) has no distribution to soften: DS is the squared difference of the two outputs.

    Args:
        student_BC, teacher_BC: logits.
        temperature: divides both logits.
        reduction:
            `batchmean` (default): KL(teacher || student) summed over classes, times temperature^2.
            `mean` (the authors' code): `batchmean` divided by C.
            `soft_ce` (the paper as printed): soft cross-entropy summed over classes, without temperature^2.
            `soft_ce_mean` (the OneFlow reference): `soft_ce` divided by C.
    """
    student_BC, teacher_BC = _wide(student_BC), _wide(teacher_BC)
    if student_BC.shape[-1] == 1:
        return (student_BC - teacher_BC).square().squeeze(-1)
    log_student_BC = F.log_softmax(student_BC / temperature, dim=-1)
    teacher_p_BC = F.softmax(teacher_BC / temperature, dim=-1)
    if reduction in ("soft_ce", "soft_ce_mean"):
        soft_ce_B = -(teacher_p_BC * log_student_BC).sum(dim=-1)
        return soft_ce_B if reduction == "soft_ce" else soft_ce_B / student_BC.shape[-1]
    kl_B = F.kl_div(log_student_BC, teacher_p_BC, reduction="none").sum(dim=-1) * temperature**2
    return kl_B if reduction == "batchmean" else kl_B / student_BC.shape[-1]


def multilabel_soft_loss(
    student_BC: torch.Tensor, teacher_BC: torch.Tensor, temperature: float, reduction: str = "batchmean"
) -> torch.Tensor:
    """Return DS (B,) where a text can have several classes.

    Each class is a distribution over two outcomes, sigmoid(logit / T) and the rest. DS is the mean over the classes of their
    `soft_loss`, as CE is of their cross-entropies.

    Args:
        student_BC, teacher_BC, temperature, reduction: see `soft_loss`, with two outcomes in place of C classes.
    """
    student_BC2, teacher_BC2 = (
        torch.stack([torch.zeros_like(logits), logits], dim=-1) for logits in (student_BC, teacher_BC)
    )
    return soft_loss(student_BC2, teacher_BC2, temperature, reduction).mean(dim=-1)


def patience_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    normalize: bool = True,
    reduction: str = "mean",
    mask_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return PT (B,): the squared distance between paired hidden states (section 3.2, equation 7).

    Args:
        student, teacher: states of the paired layers: (B, M, H) of [CLS], (B, O, M, H) of [CLS] of the O options of each example, over
            which it averages, or (B, L, M, H) of all tokens.
        normalize: L2-normalize each state first.
        reduction: Over M and H: `mean` (default; the authors' code), `sum` (the paper), or `pair_sum`: sum over M, mean
            over H (the OneFlow reference). For the same loss, beta_pair_sum = beta_mean / M = beta_sum * H.
        mask_BL: 1 for real tokens, 0 for padding. Required for states of all tokens, which it averages per example.
    """
    student, teacher = _wide(student), _wide(teacher)
    if normalize:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    distance = (student - teacher).square()
    distance = distance.mean(dim=(-2, -1)) if reduction == "mean" else distance.sum(dim=(-2, -1))
    if reduction == "pair_sum":
        distance = distance / student.shape[-1]
    if mask_BL is None:
        return distance if distance.ndim == 1 else distance.mean(dim=1)
    mask_BL = mask_BL.to(distance.dtype)
    return (distance * mask_BL).sum(dim=1) / mask_BL.sum(dim=1)


def gram_loss(student_BLMH: torch.Tensor, teacher_BLMH: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """Return GRAM (B,): the squared difference between the Gram matrices of the tokens of student and teacher.

    Args:
        student_BLMH, teacher_BLMH: hidden states of the paired layers, in their order. The widths H may differ.
        mask_BL: 1 for real tokens, 0 for padding.

    A Gram matrix holds the dot products of all pairs of real tokens, divided by the width: between the states of one layer (M
    matrices), or of a layer and the next paired one (M - 1 matrices). The result is the mean over the entries of all matrices;
    TextBrewer (Yang et al. 2020, arXiv:2002.12620), whose matches `hidden_mmd` these are, after Huang and Wang 2017
    (arXiv:1707.01219), sums over the 2M - 1 matrices instead.
    """
    difference_BGLL = (_grams(student_BLMH, mask_BL) - _grams(teacher_BLMH, mask_BL)).square()
    entries_B = mask_BL.sum(dim=1).to(difference_BGLL.dtype).square()
    return difference_BGLL.sum(dim=(-2, -1)).mean(dim=1) / entries_B


def relation_loss(
    student_BL3H: torch.Tensor, teacher_BL3H: torch.Tensor, heads: int, mask_BL: torch.Tensor
) -> torch.Tensor:
    """Return REL (B,): the divergence between the self-attention relations of one layer of student and teacher.

    A relation is softmax(X X^T / sqrt(D)) over the real tokens, where X is the queries, keys or values of one relation head of
    size D = H / heads. The result is KL(teacher || student) in nats, averaged over heads and real tokens, summed over queries,
    keys and values (Wang et al. 2021, MiniLMv2, arXiv:2012.15828, equations 6 to 9).

    Args:
        student_BL3H, teacher_BL3H: queries, keys and values, the attention heads of each concatenated. The widths H may differ.
        heads: relation heads A, which divide both widths.
        mask_BL: 1 for real tokens, 0 for padding.
    """
    padding_B111L = ~mask_BL.bool()[:, None, None, None]
    logs = []
    for states in (student_BL3H, teacher_BL3H):
        x_B3ALD = _heads(states, heads, mask_BL)
        scores_B3ALL = _products(x_B3ALD, x_B3ALD).masked_fill(padding_B111L, torch.finfo(x_B3ALD.dtype).min)
        logs.append(F.log_softmax(scores_B3ALL, dim=-1))
    divergence_B3AL = F.kl_div(logs[0], logs[1].exp(), reduction="none").sum(dim=-1)
    mask_B11L = mask_BL.to(divergence_B3AL.dtype)[:, None, None]
    return (divergence_B3AL * mask_B11L).sum(dim=(1, 2, 3)) / (heads * mask_B11L.sum(dim=(1, 2, 3)))


def attention_loss(
    student_BLP3H: torch.Tensor, teacher_BLP3H: torch.Tensor, heads: int, mask_BL: torch.Tensor
) -> torch.Tensor:
    """Return ATT (B,): the squared difference between the attention scores of paired layers of student and teacher.

    The scores are Q K^T / sqrt(D), before the softmax. The result is the mean over layers, heads and pairs of real tokens (Jiao
    et al. 2020, TinyBERT, arXiv:1909.10351, equation 7).

    Args:
        student_BLP3H, teacher_BLP3H: queries, keys and values, the heads of each concatenated. The widths H may differ.
        heads: attention heads A of both models.
        mask_BL: 1 for real tokens, 0 for padding.
    """
    scores = []
    for states in (student_BLP3H, teacher_BLP3H):
        query_BPALD, key_BPALD = (_heads(states[..., i, :], heads, mask_BL) for i in (0, 1))
        scores.append(_products(query_BPALD, key_BPALD))  # 0 where either token is padding
    difference_BPALL = (scores[0] - scores[1]).square()
    entries_B = mask_BL.sum(dim=1).to(difference_BPALL.dtype).square()
    return difference_BPALL.sum(dim=(-2, -1)).mean(dim=(1, 2)) / entries_B


def _heads(states_BLXH: torch.Tensor, heads: int, mask_BL: torch.Tensor) -> torch.Tensor:
    """Return (B, X, A, L, D): the heads of states (B, L, X, H), 0 for padding."""
    states_BLXH = _wide(states_BLXH).masked_fill(~mask_BL.bool()[..., None, None], 0.0)
    return states_BLXH.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4)


def _products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the scaled products of all pairs of tokens, (..., L, L), of heads (..., L, D)."""
    return left @ right.transpose(-2, -1) * left.shape[-1] ** -0.5


def _grams(states_BLMH: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """Return the 2M - 1 Gram matrices (B, 2M - 1, L, L); 0 where either token is padding."""
    states_BMLH = _wide(states_BLMH).masked_fill(~mask_BL.bool()[..., None, None], 0.0).transpose(1, 2)
    first, second = states_BMLH[:, :-1], states_BMLH[:, 1:]
    left, right = torch.cat([states_BMLH, first], dim=1), torch.cat([states_BMLH, second], dim=1)
    return left @ right.transpose(-2, -1) / states_BLMH.shape[-1]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
