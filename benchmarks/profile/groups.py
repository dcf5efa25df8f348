"""Group operations and kernels by purpose."""

import re
from collections.abc import Sequence

GROUPS = (
    GEMM, ATTENTION, DROPOUT, NORM, ACTIVATION, CASTS, COPIES, FILLS, OPTIMIZER, CLIPPING, COMMUNICATION, OTHER,
) = (
    "GEMM", "attention", "dropout", "layer norm", "activation", "casts", "copies", "clearing and fills", "optimizer",
    "clipping", "communication", "other",
)  # fmt: skip
HOST, IDLE = "host, Python", "GPU idle"

_OPERATIONS = (
    (COMMUNICATION, r"^(c10d::|gloo:|nccl:|record_param_comms|DistributedDataParallel)"),
    (ATTENTION, r"scaled_dot_product|flash|efficient_attention|_softmax|masked_fill|aten::(bmm|baddbmm)$|varlen"),
    (GEMM, r"^aten::(mm|addmm|_addmm_activation|linear|matmul|einsum|_int_mm)$|mkldnn.*(linear|matmul)|onednn"),
    (DROPOUT, r"dropout|bernoulli|aten::(rand|random_|uniform_|rand_like)$"),
    (NORM, r"layer_?norm|LayerNorm"),
    (ACTIVATION, r"gelu|aten::(tanh|relu)|tanh_backward"),
    (CLIPPING, r"norm_except|aten::(norm|linalg_vector_norm|clamp)|_foreach_norm|clip_grad|aten::(isfinite|isnan|isinf)$"),
    (OPTIMIZER, r"adam|Optimizer\.|_foreach_(add|addc|lerp|sqrt|div)|addcdiv|addcmul|lerp"),
    (FILLS, r"aten::(zero_|fill_|zeros|zeros_like|full|ones|ones_like|full_like|_foreach_zero_)$"),
)  # fmt: skip
_PATTERNS = dict(_OPERATIONS)
_KERNELS = (
    (COMMUNICATION, r"nccl"),
    (ATTENTION, r"flash|fmha|attention|softmax|mha"),
    (GEMM, r"gemm|gemv|cutlass|xmma|nvjet|cublas|sm\d\d_.*_s?\d+x\d+"),
    (DROPOUT, r"dropout|bernoulli|philox|distribution_elementwise"),
    (NORM, r"layer_?norm|GammaBeta"),
    (ACTIVATION, r"gelu|tanh"),
    (OPTIMIZER, r"adam|multi_tensor_apply.*(?!norm)Adam"),
    (CLIPPING, r"norm_?(kernel|functor|ops)|lpnorm|isfinite"),
    (FILLS, r"memset|fill"),
    (COPIES, r"memcpy|copy"),
)
_CAST_PARENTS = ("aten::to", "aten::_to_copy", "aten::type_as", "aten::float", "aten::bfloat16", "aten::half")
_CASTS_IN_KERNELS = re.compile(r"bfloat16_copy|float16_copy|copy_kernel.*(bfloat16|half)", re.I)


def of_operation(name: str, parents: Sequence[str], phase: str) -> str:
    """Return the group of an operation; `parents` called it, innermost first, in a phase of `worker.phases`."""
    in_model = phase in ("forward", "backward", "")
    for group, pattern in _OPERATIONS:
        if re.search(pattern, name, re.I) and (in_model or group != ATTENTION):
            return group
    if in_model and any(re.search(_PATTERNS[ATTENTION], parent, re.I) for parent in parents[:3]):
        return ATTENTION  # part of an attention that has no kernel of its own
    if any("ropout" in parent for parent in parents[:2]):
        return DROPOUT
    if name in _CAST_PARENTS:
        return CASTS
    if name in ("aten::copy_", "aten::clone", "aten::contiguous", "aten::cat", "aten::flatten", "aten::_foreach_copy_"):
        return CASTS if any(parent in _CAST_PARENTS for parent in parents) else COPIES
    if any(re.search(_PATTERNS[OPTIMIZER], parent, re.I) for parent in parents):
        return OPTIMIZER
    return CLIPPING if phase == "engine step" and name.startswith(("aten::mul", "aten::_foreach_mul")) else OTHER


def of_kernel(name: str) -> str:
    """Return the group of a GPU kernel, copy or fill."""
    if _CASTS_IN_KERNELS.search(name):
        return CASTS
    return next((group for group, pattern in _KERNELS if re.search(pattern, name, re.I)), OTHER)
