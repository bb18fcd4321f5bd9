"""The enumerations of the compiled part, whose members its Python names and compares."""

import enum

import torch


def _members(name, text):
    return enum.IntEnum(name, {member: number for number, member in enumerate(text.split())})


def _prefixed(name, prefix, text):
    return _members(name, " ".join(prefix + member for member in text.split()))


_LAYOUTS = (
    "SB3HD SBH3D SBHD_SB2HD SBHD_SBH2D SBHD_SBHD_SBHD BS3HD BSH3D BSHD_BS2HD BSHD_BSH2D BSHD_BSHD_BSHD "
    "T3HD TH3D THD_T2HD THD_TH2D THD_THD_THD SBHD_BSHD_BSHD BSHD_SBHD_SBHD THD_BSHD_BSHD THD_SBHD_SBHD "
    "Paged_KV_BSHD_BSHD_BSHD Paged_KV_BSHD_SBHD_SBHD Paged_KV_SBHD_BSHD_BSHD Paged_KV_SBHD_SBHD_SBHD "
    "Paged_KV_THD_BSHD_BSHD Paged_KV_THD_SBHD_SBHD"
)
DType = _prefixed(
    "DType",
    "k",
    "Byte Int16 Int32 Int64 Float32 Float16 BFloat16 Float8E4M3 Float8E5M2 Float8E8M0 Float4E2M1",
)
FP8FwdTensors = _members(
    "FP8FwdTensors", " ".join(f"GEMM{n}_{what}" for n in (1, 2, 3) for what in ("INPUT", "WEIGHT", "OUTPUT"))
)
FP8BwdTensors = _members(
    "FP8BwdTensors", " ".join(f"GRAD_{what}{n}" for n in (1, 2, 3) for what in ("OUTPUT", "INPUT"))
)
NVTE_Bias_Type = _prefixed("NVTE_Bias_Type", "NVTE_", "NO_BIAS PRE_SCALE_BIAS POST_SCALE_BIAS ALIBI")
NVTE_Mask_Type = _prefixed(
    *("NVTE_Mask_Type", "NVTE_"),
    "NO_MASK PADDING_MASK CAUSAL_MASK PADDING_CAUSAL_MASK CAUSAL_BOTTOM_RIGHT_MASK "
    "PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
)
NVTE_Softmax_Type = _prefixed(
    "NVTE_Softmax_Type", "NVTE_", "VANILLA_SOFTMAX OFF_BY_ONE_SOFTMAX LEARNABLE_SOFTMAX"
)
NVTE_QKV_Format = _prefixed(
    "NVTE_QKV_Format", "NVTE_", "BSHD SBHD THD SBHD_2BSHD BSHD_2SBHD THD_2BSHD THD_2SBHD"
)
NVTE_QKV_Layout = _prefixed("NVTE_QKV_Layout", "NVTE_", _LAYOUTS)
NVTE_Fused_Attn_Backend = enum.IntEnum(
    "NVTE_Fused_Attn_Backend",
    {"NVTE_No_Backend": -1, "NVTE_F16_max512_seqlen": 0, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2},
)
Float8BlockScaleTensorFormat = _members("Float8BlockScaleTensorFormat", "GEMM_READY COMPACT")
CommOverlapType = _members("CommOverlapType", "RS AG")
CommOverlapAlgo = _members(
    "CommOverlapAlgo",
    "BULK_OVERLAP_AG BULK_OVERLAP_RS SPLIT_PIPELINED_AG_P2P SPLIT_PIPELINED_RS SPLIT_PIPELINED_RS_P2P "
    "ATOMIC_GEMM_RS ATOMIC_GEMM_AG_P2P ATOMIC_GEMM_RS_P2P EXTERNAL_BULK_OVERLAP_AG",
)
CommOverlap, CommOverlapP2P, CommOverlapHelper, FP8TensorMeta = (
    type(name, (), {}) for name in ("CommOverlap", "CommOverlapP2P", "CommOverlapHelper", "FP8TensorMeta")
)
TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kInt64: torch.int64,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}
"""torch's dtypes."""
