"""Small random weights as other libraries pack them, with the values that those libraries give them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from helpers import RawTensor
from numpy.typing import NDArray

from numoe.quant.dtypes import E2M1, E4M3, decode_e8m0, encode_bf16

Made = tuple[dict[str, RawTensor], NDArray[np.float64]]
ROWS, WIDTH = 64, 256
SEED = 0
"""Another one makes other weights."""
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32,
)  # fmt: skip


def raw(dtype: str, values: NDArray[Any]) -> RawTensor:
    return dtype, values.shape, np.ascontiguousarray(values).tobytes()


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng([SEED, seed])


def bits_of(codes: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """Rows of fields as rows of 32-bit words, least significant first, by integers of any length."""
    words = -(-codes.shape[1] * bits // 32)
    out = np.zeros((len(codes), words), np.uint32)
    for row, fields in enumerate(codes.astype(int).tolist()):
        whole = sum(code << (bits * place) for place, code in enumerate(fields))
        out[row] = np.frombuffer(whole.to_bytes(4 * words, "little"), "<u4")
    return out.view(np.int32)


def scales(seed: int, *shape: int, dtype: str = "F16") -> tuple[RawTensor, NDArray[np.float64]]:
    """Scales in a dtype, and their values."""
    values = (rng(seed).random(shape) + 0.5).astype(np.float32) / 64
    if dtype == "BF16":
        codes = encode_bf16(values)
        return raw(dtype, codes), (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    held = values.astype({"F16": np.float16, "F32": np.float32}[dtype])
    return raw(dtype, held), held.astype(np.float64)


def spread(values: NDArray[Any], width: int) -> NDArray[Any]:
    return np.repeat(values, width // values.shape[-1], axis=-1)


def e4m3(seed: int, *shape: int) -> NDArray[np.uint8]:
    codes = rng(seed).integers(0, 256, shape).astype(np.uint8)
    codes[codes & 0x7F == 0x7F] ^= 1
    return codes


def ct_packed(
    bits: int, group: int, *, zero: bool = False, loose: bool = False, order: bool = False, dtype: str = "BF16"
) -> Made:
    q = rng(1).integers(0, 1 << bits, (ROWS, WIDTH))
    scale, s = scales(2, ROWS, WIDTH // group, dtype=dtype)
    tensors = {"a.weight_packed": raw("I32", bits_of(q, bits)), "a.weight_scale": scale}
    tensors["a.weight_shape"] = raw("I64", np.array([ROWS, WIDTH]))
    half = 1 << (bits - 1)
    z = np.full((ROWS, WIDTH // group), half)
    if zero:
        z = rng(3).integers(0, 1 << bits, z.shape)
        tensors["a.weight_zero_point"] = raw("I8", (z - half).astype(np.int8)) if loose else (
            raw("I32", bits_of(z.T, bits).T))  # fmt: skip
    groups = np.arange(WIDTH) // group
    if order:
        groups = rng(4).permutation(groups)
        tensors["a.weight_g_idx"] = raw("I32", groups.astype(np.int32))
    return tensors, (q - z[:, groups]) * s[:, groups]


def ct_fp8(
    block: tuple[int, int] | None, shape: tuple[int, ...], dtype: str = "BF16", name: str = "weight_scale"
) -> Made:
    codes = e4m3(1, ROWS, WIDTH)
    scale, s = scales(2, *shape, dtype=dtype)
    height, width = block or (ROWS, WIDTH)
    whole = np.repeat(np.repeat(s.reshape(-(-ROWS // height), -(-WIDTH // width)), height, 0), width, 1)
    return {
        "a.weight": raw("F8_E4M3", codes),
        f"a.{name}": scale,
        "a.input_scale": raw("F32", np.ones((), np.float32)),
    }, (E4M3[codes] * whole[:ROWS, :WIDTH])


def ct_int8(shape: tuple[int, ...], zero: bool = False) -> Made:
    codes = rng(1).integers(-128, 128, (ROWS, WIDTH)).astype(np.int8)
    scale, s = scales(2, *shape, dtype="BF16")
    tensors = {"a.weight": raw("I8", codes), "a.weight_scale": scale}
    z = np.zeros(shape)
    if zero:
        z = rng(3).integers(-128, 128, shape).astype(np.int8)
        tensors["a.weight_zero_point"] = raw("I8", z)
        z = z.astype(int)
    return tensors, (codes - z.reshape(-1, 1)) * s.reshape(-1, 1)


def four(seed: int = 1) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """Codes, as bytes with the low nibble first, and e2m1 values."""
    q = rng(seed).integers(0, 16, (ROWS, WIDTH)).astype(np.uint8)
    return q, q[:, ::2] | q[:, 1::2] << 4, E2M1[q]


def nvfp4(codes: str, factor: str, divides: bool) -> Made:
    _, packed, values = four()
    s = e4m3(2, ROWS, WIDTH // 16) & 0x7F
    one = np.array([0.37], np.float32)
    tensors = {codes: raw("U8", packed), "a.weight_scale": raw("F8_E4M3", s)}
    tensors[factor] = raw("F32", one if divides else one.reshape(()))
    tensors["a.input_global_scale" if divides else "a.input_scale"] = raw("F32", one)
    return tensors, values * spread(E4M3[s].astype(np.float64), WIDTH) * float(one[0]) ** (-1 if divides else 1)


def mxfp4(codes: str) -> Made:
    _, packed, values = four()
    s = rng(2).integers(110, 130, (ROWS, WIDTH // 32)).astype(np.uint8)
    return {codes: raw("U8", packed), "a.weight_scale": raw("U8", s)}, values * spread(decode_e8m0(s), WIDTH)


def awq(group: int | None = 64) -> Made:
    group, places = group or WIDTH, [0, 2, 4, 6, 1, 3, 5, 7]
    q, z = rng(1).integers(0, 16, (WIDTH, ROWS)), rng(2).integers(0, 16, (WIDTH // group, ROWS))
    scale, s = scales(3, WIDTH // group, ROWS)

    def pack(codes: NDArray[Any]) -> RawTensor:
        return raw("I32", bits_of(codes.reshape(len(codes), -1, 8)[..., places].reshape(codes.shape), 4))

    tensors = {"a.qweight": pack(q), "a.qzeros": pack(z), "a.scales": scale}
    return tensors, ((q - np.repeat(z, group, 0)) * np.repeat(s, group, 0)).T


def gemv(group: int | None, words: int) -> Made:
    """words: of a row of zero points, filled up."""
    group = group or WIDTH
    groups = WIDTH // group
    q, z = rng(1).integers(0, 16, (ROWS, WIDTH)), np.zeros((ROWS, 8 * words), np.int64)
    z[:, :groups] = rng(2).integers(0, 16, (ROWS, groups))
    (dtype, _, data), s = scales(3, ROWS, groups)
    filled = np.zeros((ROWS, 8 * words), np.float16)
    filled[:, :groups] = np.frombuffer(data, np.float16).reshape(ROWS, groups)
    tensors = {"a.qweight": raw("I32", bits_of(q, 4)), "a.qzeros": raw("I32", bits_of(z, 4))}
    tensors["a.scales"] = raw(dtype, filled)
    return tensors, (q - np.repeat(z[:, :groups], group, 1)) * np.repeat(s, group, 1)


def gptq(bits: int, *, sym: bool, less: int, order: bool = False, index: bool = True, group: int | None = 64) -> Made:
    group = group or WIDTH
    q = rng(1).integers(0, 1 << bits, (WIDTH, ROWS))
    z = rng(2).integers(0, 1 << bits, (WIDTH // group, ROWS))
    if sym:
        z[:] = 1 << (bits - 1)
    scale, s = scales(3, WIDTH // group, ROWS)
    groups = np.arange(WIDTH) // group
    if order:
        groups = rng(4).permutation(groups)
    tensors = {
        "a.qweight": raw("I32", bits_of(q.T, bits).T),
        "a.qzeros": raw("I32", bits_of((z - less) % (1 << bits), bits)),
        "a.scales": scale,
    }
    if index:
        tensors["a.g_idx"] = raw("I32", groups.astype(np.int32))
    return tensors, ((q - z[groups]) * s[groups]).T


def mlx(bits: int, group: int = 64, dtype: str = "BF16") -> Made:
    q = rng(1).integers(0, 1 << bits, (ROWS, WIDTH))
    scale, s = scales(2, ROWS, WIDTH // group, dtype=dtype)
    bias, b = scales(3, ROWS, WIDTH // group, dtype=dtype)
    tensors = {"a.weight": raw("U32", bits_of(q, bits).view(np.uint32)), "a.scales": scale, "a.biases": bias}
    return tensors, q * spread(s, WIDTH) + spread(b, WIDTH)


def mlx_float(mode: str) -> Made:
    if mode == "mxfp8":
        codes = e4m3(1, ROWS, WIDTH)
        words, values, group = codes.view("<u4"), E4M3[codes], 32
    else:
        _, packed, values = four()
        words, group = packed.view("<u4"), 32 if mode == "mxfp4" else 16
    s = rng(2).integers(110, 127, (ROWS, WIDTH // group)).astype(np.uint8)
    factors = E4M3[s] if mode == "nvfp4" else decode_e8m0(s)
    return {"a.weight": raw("U32", words), "a.scales": raw("U8", s)}, values * spread(factors.astype(np.float64), WIDTH)


def mxfp8() -> Made:
    codes, s = e4m3(1, ROWS, WIDTH), rng(2).integers(110, 127, (ROWS, WIDTH // 32)).astype(np.uint8)
    values = E4M3[codes] * spread(decode_e8m0(s).astype(np.float64), WIDTH)
    return {"a.weight": raw("F8_E4M3", codes), "a.weight_scale": raw("U8", s)}, values


def bnb4(kind: str = "nf4", nested: bool = True) -> Made:
    q = rng(1).integers(0, 16, ROWS * WIDTH).astype(np.uint8)
    count = -(-q.size // 64)
    table = NF4 if kind == "nf4" else np.linspace(-1, 1, 16, dtype=np.float32)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [ROWS, WIDTH]}
    tensors = {"a.weight": raw("U8", (q[::2] << 4 | q[1::2])[:, None]), "a.weight.quant_map": raw("F32", table)}
    if nested:
        codes, lookup = rng(2).integers(0, 256, count).astype(np.uint8), rng(3).random(256).astype(np.float32)
        outer = rng(4).random(-(-count // 256)).astype(np.float32)
        state |= {"nested_blocksize": 256, "nested_offset": 0.25, "nested_dtype": "float32"}
        tensors |= {
            "a.weight.absmax": raw("U8", codes),
            "a.weight.nested_absmax": raw("F32", outer),
            "a.weight.nested_quant_map": raw("F32", lookup),
        }
        maxima = lookup[codes].astype(np.float64) * np.repeat(outer, 256)[:count] + 0.25
    else:
        tensors["a.weight.absmax"], maxima = scales(2, count, dtype="F32")
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[f"a.weight.quant_state.bitsandbytes__{kind}"] = raw("U8", text)
    return tensors, (table[q] * np.repeat(maxima, 64)[: q.size]).reshape(ROWS, WIDTH)


def bnb8() -> Made:
    codes = rng(1).integers(-127, 128, (ROWS, WIDTH)).astype(np.int8)
    scb, s = scales(2, ROWS, dtype="F32")
    form = raw("U8", np.zeros((), np.uint8))
    return {"a.weight": raw("I8", codes), "a.SCB": scb, "a.weight_format": form}, codes * s[:, None] / 127


def ct(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


@dataclass(frozen=True)
class Case:
    config: dict[str, Any]
    make: Callable[[], Made]
    kind: str
    exact: bool = True
    optional: tuple[str, ...] = ()
    """Parts that may be left out; those that serve activations are known."""
    key: str = "quantization_config"
    table: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", {self.key: self.config})


FP8 = {"quant_method": "fp8", "fmt": "float8_e4m3fn"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
GPTQ = {"quant_method": "gptq", "group_size": 64}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "data_type": "int", "iters": 0, "nsamples": 512,
         "autoround_version": "0.16.1", "block_name_to_quantize": "model.layers", "low_gpu_mem_usage": True,
         "extra_config": {"lm_head": {"bits": 16, "data_type": "float"}, ".*norm.*": {"bits": 16}}}  # fmt: skip
PACKED = {"type": "int", "strategy": "group"}
SEVERAL = ct("pack-quantized") | {
    "config_groups": {
        f"group_{number}": {"targets": targets, "weights": {"type": "int"} | weights}
        for number, (targets, weights) in enumerate([
            (["Linear"], PACKED | {"num_bits": 4, "group_size": 32}),
            (["re:.*self_attn.*", "re:.*shared.*"], PACKED | {"num_bits": 8, "group_size": 32, "symmetric": False}),
            (["model.layers.0.mlp.down_proj"], PACKED | {"num_bits": 4, "group_size": 64, "actorder": "group"}),
            (["lm_head"], {"num_bits": 8, "strategy": "channel"}),
            (["FusedMoE"], {"num_bits": 4, "strategy": "channel"}),
        ])
    }
}  # fmt: skip
DYNAMIC = GPTQ | {"bits": 4, "sym": True, "dynamic": {
    "-:.*gate.*": {}, r"+:.*\.attn\..*": {"bits": 8, "group_size": 32, "sym": False},
    r".*mlp": {"bits": 8, "desc_act": True}, r".*down(?!x)": {"bits": 3, "group_size": -1}}}  # fmt: skip
QUARK = {"quant_method": "quark", "global_quant_config": {}}
FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
CASES = {
    "ct w4a16": Case(ct("pack-quantized", **PACKED, num_bits=4, group_size=32), lambda: ct_packed(4, 32), "int4"),
    "ct w4a16 f16": Case(
        ct("pack-quantized", **PACKED, num_bits=4, group_size=128), lambda: ct_packed(4, 128, dtype="F16"), "int4"
    ),
    "ct w3a16": Case(ct("pack-quantized", **PACKED, num_bits=3, group_size=64), lambda: ct_packed(3, 64), "int4"),
    "ct w8a16": Case(
        ct("pack-quantized", type="int", strategy="channel", num_bits=8), lambda: ct_packed(8, WIDTH), "int8"
    ),
    "ct w6a16": Case(ct("pack-quantized", **PACKED, num_bits=6, group_size=64), lambda: ct_packed(6, 64), "int8"),
    "ct w4a16 asymmetric": Case(
        ct("pack-quantized", **PACKED, num_bits=4, group_size=32, symmetric=False),
        lambda: ct_packed(4, 32, zero=True),
        "int4",
    ),
    "ct w8a16 asymmetric": Case(
        ct("pack-quantized", **PACKED, num_bits=8, group_size=128, symmetric=False),
        lambda: ct_packed(8, 128, zero=True),
        "int8",
    ),
    "ct w4a16 loose zero points": Case(
        ct("pack-quantized", **PACKED, num_bits=4, group_size=32, symmetric=False),
        lambda: ct_packed(4, 32, zero=True, loose=True),
        "int4",
    ),
    "ct mxfp8": Case(
        ct("mxfp8-quantized", type="float", num_bits=8, strategy="group", group_size=32, scale_dtype="torch.uint8"),
        mxfp8,
        "fp8",
    ),
    "ct actorder": Case(
        ct("pack-quantized", **PACKED, num_bits=4, group_size=32, actorder="group"),
        lambda: ct_packed(4, 32, order=True),
        "int4",
    ),
    "ct actorder asymmetric": Case(
        ct("pack-quantized", **PACKED, num_bits=8, group_size=32, actorder="group", symmetric=False),
        lambda: ct_packed(8, 32, zero=True, order=True),
        "int8",
    ),
    **{
        f"ct several {name}": Case(SEVERAL, make, kind)
        for name, make, kind in (
            ("4", lambda: ct_packed(4, 32), "int4"),
            ("8", lambda: ct_packed(8, 32, zero=True), "int8"),
            ("4 in order", lambda: ct_packed(4, 64, order=True), "int4"),
            ("8 a row", lambda: ct_packed(8, WIDTH), "int8"),
            ("4 a row", lambda: ct_packed(4, WIDTH), "int4"),
        )
    },
    "ct w8a8": Case(ct("int-quantized", num_bits=8, strategy="channel"), lambda: ct_int8((ROWS, 1)), "int8"),
    "ct w8a8 tensor": Case(ct("int-quantized", num_bits=8, strategy="tensor"), lambda: ct_int8((1,)), "int8"),
    "ct w8a8 asymmetric": Case(
        ct("int-quantized", num_bits=8, symmetric=False, strategy="channel"),
        lambda: ct_int8((ROWS, 1), zero=True),
        "int8",
    ),
    "ct fp8 tensor": Case(ct("float-quantized", type="float", strategy="tensor"), lambda: ct_fp8(None, (1,)), "fp8"),
    "ct fp8 channel": Case(
        ct("float-quantized", type="float", strategy="channel"), lambda: ct_fp8((1, WIDTH), (ROWS, 1)), "fp8"
    ),
    "ct fp8 block": Case(
        ct("float-quantized", type="float", strategy="block", block_structure=[32, 64]),
        lambda: ct_fp8((32, 64), (ROWS // 32, WIDTH // 64), "F32"),
        "fp8",
    ),
    "ct fp8 block of odd size": Case(  # which has as many scales as blocks of 128 would
        ct("float-quantized", type="float", strategy="block", block_structure=[100, 160]),
        lambda: ct_fp8((100, 160), (-(-ROWS // 100), -(-WIDTH // 160)), "F32"),
        "fp8",
    ),
    "ct nvfp4": Case(
        ct("nvfp4-pack-quantized", type="float", num_bits=4, strategy="tensor_group", group_size=16),
        lambda: nvfp4("a.weight_packed", "a.weight_global_scale", True),
        "nvfp4",
        exact=False,
    ),
    "ct mxfp4": Case(
        ct("mxfp4-pack-quantized", type="float", num_bits=4, strategy="group", group_size=32),
        lambda: mxfp4("a.weight_packed"),
        "mxfp4",
    ),
    "fp8 scalar": Case(
        FP8 | {"activation_scheme": "static", "weight_block_size": None}, lambda: ct_fp8(None, (), "F32"), "fp8"
    ),
    "fp8 scalar inverse": Case(
        FP8 | {"weight_block_size": None, "dequantize": False},
        lambda: ct_fp8(None, (), "BF16", "weight_scale_inv"),
        "fp8",
    ),
    "fp8 blocks": Case(
        FP8 | {"weight_block_size": [32, 32]}, lambda: ct_fp8((32, 32), (ROWS // 32, WIDTH // 32), "F32"), "fp8"
    ),
    "fbgemm": Case({"quant_method": "fbgemm_fp8"}, lambda: ct_fp8((1, WIDTH), (ROWS, 1), "F32"), "fp8"),
    "modelopt fp8": Case({"quant_method": "modelopt", "quant_algo": "FP8"}, lambda: ct_fp8(None, (), "F32"), "fp8"),
    "modelopt fp8 channel": Case(
        {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, lambda: ct_fp8((1, WIDTH), (ROWS,), "F32"), "fp8"
    ),
    "modelopt fp8 blocks": Case(
        {"quant_algo": "FP8_PB_WO", "quant_method": "modelopt"},
        lambda: ct_fp8((128, 128), (-(-ROWS // 128), 1, -(-WIDTH // 128), 1), "F32"),
        "fp8",
    ),
    "modelopt nvfp4": Case(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        lambda: nvfp4("a.weight", "a.weight_scale_2", False),
        "nvfp4",
        exact=False,
    ),
    "modelopt mixed": Case(
        {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {"a": {"quant_algo": "NVFP4"}, "b": {"quant_algo": "FP8"}},
        },
        lambda: nvfp4("a.weight", "a.weight_scale_2", False),
        "nvfp4",
        exact=False,
    ),
    "modelopt mxfp8": Case({"quant_method": "modelopt", "quant_algo": "mxfp8"}, mxfp8, "fp8"),
    "modelopt inside": Case(
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}},
        lambda: ct_fp8(None, (), "F32"),
        "fp8",
    ),
    "awq of a row": Case({"quant_method": "awq", "w_bit": 4, "q_group_size": -1}, lambda: awq(None), "int4"),
    **{
        f"awq gemv g{group}": Case(
            {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemv", "zero_point": True},
            lambda group=group, words=words: gemv(group if group > 0 else None, words),
            "int4",
        )
        for group, words in ((32, 4), (64, 2), (128, 1), (-1, 1))
    },
    "awq of gptqmodel": Case(
        {
            "quant_method": "awq",
            "method": "awq",
            "bits": 4,
            "group_size": 64,
            "format": "gemm",
            "desc_act": False,
            "checkpoint_format": "gemm",
            "pack_dtype": "int32",
            "zero_point": False,
            "version": "gemm",
            "meta": {"quantizer": ["gptqmodel:7.7.0"]},
        },
        awq,
        "int4",
    ),
    "awq": Case(
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}, awq, "int4"
    ),
    "gptq v1": Case(GPTQ | {"bits": 4, "sym": True}, lambda: gptq(4, sym=True, less=1), "int4", optional=("a.g_idx",)),
    "gptq that lies": Case(
        GPTQ | {"bits": 4, "sym": True, "checkpoint_format": "gptq"},
        lambda: gptq(4, sym=True, less=0, index=False),
        "int4",
    ),
    "gptq v2": Case(
        GPTQ | {"bits": 4, "sym": False, "checkpoint_format": "gptq_v2"},
        lambda: gptq(4, sym=False, less=0, index=False),
        "int4",
    ),
    "gptq v1 asymmetric": Case(
        GPTQ | {"bits": 4, "sym": False}, lambda: gptq(4, sym=False, less=1, index=False), "int4"
    ),
    **{
        f"gptq {bits} bits": Case(
            GPTQ | {"bits": bits, "sym": False},
            lambda bits=bits: gptq(bits, sym=False, less=1, index=False),
            "int8" if bits == 8 else "int4",
        )
        for bits in (2, 3, 8)
    },
    "gptq of gptqmodel": Case(
        GPTQ
        | {
            "bits": 4,
            "sym": True,
            "method": "gptq",
            "format": "gptq",
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "lm_head": False,
            "desc_act": False,
            "meta": {"mse": 0.0},
        },
        lambda: gptq(4, sym=True, less=1),
        "int4",
        optional=("a.g_idx",),
    ),
    **{
        f"gptq several {name}": Case(DYNAMIC, make, kind, optional=optional)
        for name, make, kind, optional in (
            ("4", lambda: gptq(4, sym=True, less=1), "int4", ("a.g_idx",)),
            ("8", lambda: gptq(8, sym=False, less=1, group=32), "int8", ("a.g_idx",)),
            ("8 in order", lambda: gptq(8, sym=True, less=1, group=64, order=True), "int8", ()),
            ("3 a row", lambda: gptq(3, sym=True, less=1, group=None), "int4", ("a.g_idx",)),
        )
    },
    **{
        f"auto-round several {name}": Case(
            ROUND
            | {
                "sym": True,
                "packing_format": "auto_round:auto_gptq",
                "extra_config": {
                    "a": {"bits": 8, "group_size": 32, "sym": False},
                    "b": {"bits": 16, "data_type": "fp"},
                    "c": {"bits": 8},
                },
            },
            make,
            kind,
        )
        for name, make, kind in (
            ("4", lambda: gptq(4, sym=True, less=1, index=False), "int4"),
            ("8", lambda: gptq(8, sym=False, less=1, group=32, index=False), "int8"),
            ("8 in other groups", lambda: gptq(8, sym=True, less=1, index=False), "int8"),
        )
    },
    "gptq of a row": Case(
        GPTQ | {"bits": 4, "sym": False, "group_size": -1, "format": "gptq_v2"},
        lambda: gptq(4, sym=False, less=0, index=False, group=None),
        "int4",
    ),
    **{
        f"auto-round as {packing}": Case(
            ROUND | {"sym": sym, "packing_format": f"auto_round{packing}"},
            lambda sym=sym, less=less: awq() if less is None else gptq(4, sym=sym, less=less, index=False),
            "int4",
        )
        for packing, sym, less in (
            (":auto_gptq", True, 1),
            (":auto_gptq", False, 1),
            ("", False, 0),
            (":gptqmodel", False, 0),
            (":auto_awq", False, None),
        )
    },
    "gptq desc_act": Case(
        GPTQ | {"bits": 4, "sym": True, "desc_act": True}, lambda: gptq(4, sym=True, less=1, order=True), "int4"
    ),
    **{
        f"mlx {bits} bits": Case(
            {"group_size": 64, "bits": bits},
            lambda bits=bits: mlx(bits),
            "int4" if bits <= 4 else "int8",
            exact=False,
            key="quantization",
        )
        for bits in (2, 3, 4, 5, 6, 8)
    },
    "mlx of a layer": Case(
        {"group_size": 64, "bits": 4, "a": {"group_size": 32, "bits": 8}},
        lambda: mlx(8, 32, "F16"),
        "int8",
        exact=False,
        key="quantization",
    ),
    **{
        f"mlx {mode}": Case(
            {"group_size": 32, "bits": 4, "mode": mode},
            lambda mode=mode: mlx_float(mode),
            "fp8" if mode == "mxfp8" else mode,
            key="quantization",
        )
        for mode in ("mxfp4", "nvfp4", "mxfp8")
    },
    "bnb nf4": Case(BNB | {"bnb_4bit_quant_type": "nf4"}, bnb4, "nf4", exact=False),
    "bnb nf4 plain": Case(BNB | {"bnb_4bit_quant_type": "nf4"}, lambda: bnb4(nested=False), "nf4", exact=False),
    "bnb fp4": Case(BNB | {"bnb_4bit_quant_type": "fp4"}, lambda: bnb4("fp4", False), "f32", exact=False),
    "bnb int8": Case({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb8, "int8", exact=False),
    "quark fp8": Case(
        QUARK | {"global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_channel"}}},
        lambda: ct_fp8((1, WIDTH), (ROWS,), "F32"),
        "fp8",
    ),
    "quark int8": Case(
        QUARK | {"global_quant_config": {"weight": {"dtype": "int8", "qscheme": "per_channel", "symmetric": True}}},
        lambda: ct_int8((ROWS,)),
        "int8",
    ),
    "quark int8 with zero points": Case(
        QUARK | {"global_quant_config": {"weight": {"dtype": "int8", "qscheme": "per_tensor", "symmetric": False}}},
        lambda: ct_int8((), zero=True),
        "int8",
    ),
    "quark mxfp4": Case(QUARK | {"global_quant_config": {"weight": FP4}}, lambda: mxfp4("a.weight"), "mxfp4"),
}
