"""Writes tests/golden/quantized_*.npz: small weights as the libraries themselves quantize, pack and unpack them.

    pip install torch transformers compressed-tensors bitsandbytes nvidia-modelopt amd-quark 'mlx[cpu]'
    pip install --no-deps logbar device-smi
    pip download --no-deps --no-binary :all: autoawq auto-gptq gptqmodel, unpack these into FOLDER, and
    python make_quantized.py FOLDER [compressed_tensors] [modelopt] [awq] [gptq] [bitsandbytes] [mlx] [fp8] [quark]

The three of the third line do not install without CUDA; their packing runs without the rest of them. A file holds, for
each case, the config, the tensors of X.weight with their dtypes, and the float32 values that the library makes of them.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

Case = tuple[str, dict[str, Any], dict[str, torch.Tensor], torch.Tensor]
"""Name, quantization_config, tensors by name, values (out, in) float32."""
OUT = Path(__file__).parents[1] / "golden"
ROWS, WIDTH = 16, 128
DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8",
    torch.int32: "I32", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3", torch.uint32: "U32",
    torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


def weights(seed: int = 0, rows: int = ROWS, width: int = WIDTH) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 0.02, (rows, width)).astype(np.float32))


def e2m1(packed: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    return table[torch.stack((packed & 15, packed >> 4), -1).long()].reshape(len(packed), -1)


def spread(scales: torch.Tensor, group: int) -> torch.Tensor:
    return scales.float().repeat_interleave(group, dim=1)


# ------------------------------------------------------------------------------------------------ the libraries


def compressed_tensors() -> Iterator[Case]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    def case(name: str, format: str, **args: Any) -> Case:
        arguments = QuantizationArgs(**args)
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=format)
        config = QuantizationConfig(config_groups={"group_0": scheme}, format=format, quantization_status="compressed")
        w, group = weights(), args.get("group_size") or WIDTH
        if args["strategy"] == "block":
            high, wide = args["block_structure"]
            blocks = w.reshape(ROWS // high, high, WIDTH // wide, wide).transpose(1, 2).flatten(2)
        elif args["strategy"] == "tensor":
            blocks = w.reshape(1, 1, -1)
        else:
            blocks = w.reshape(ROWS, WIDTH // group, group)
        scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments)
        state = {"weight": w, "weight_scale": scale}
        if format.startswith(("nvfp4", "mxfp4")):
            largest = w.abs().max()
            divisor = torch.tensor([448 * 6 / float(largest)])
            each = blocks.abs().amax(-1) / 6
            scale = each * divisor if format.startswith("nv") else torch.exp2(torch.ceil(torch.log2(each)))
            state["weight_scale"] = scale.to(torch.float8_e4m3fn).float() if format.startswith("nv") else scale
            if format.startswith("nv"):
                state["weight_global_scale"] = divisor
        if not args.get("symmetric", True):
            state["weight_zero_point"] = zero
        compressor = BaseCompressor.get_value_from_registry(format)
        packed = dict(compressor.compress(state, scheme))
        values = compressor.decompress(dict(packed), scheme)["weight"].float()
        if "fp4" in format:  # which it unpacks to bfloat16
            own = e2m1(packed["weight_packed"])
            exact = packed["weight_scale"].float() if format.startswith("nv") else (
                torch.exp2(packed["weight_scale"].float() - 127))  # fmt: skip
            full = own * spread(exact, group) / (packed["weight_global_scale"] if format.startswith("nv") else 1)
            assert torch.allclose(full, values, rtol=1e-2)
            values = full
        named = {f"X.{part}": tensor for part, tensor in packed.items()}
        return name, json.loads(config.model_dump_json()), named, values

    ints = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32}
    yield case("w4a16", "pack-quantized", symmetric=True, **ints)
    yield case("w4a16 asymmetric", "pack-quantized", symmetric=False, **ints)
    yield case("w4a16 channel", "pack-quantized", type="int", num_bits=4, strategy="channel")
    yield case("w8a16", "pack-quantized", type="int", num_bits=8, strategy="channel")
    yield case("w8a8", "int-quantized", type="int", num_bits=8, strategy="channel")
    yield case("w8a8 asymmetric", "int-quantized", type="int", num_bits=8, strategy="channel", symmetric=False)
    for strategy in ("tensor", "channel"):
        yield case(f"fp8 {strategy}", "float-quantized", type="float", num_bits=8, strategy=strategy)
    yield case("fp8 block", "float-quantized", type="float", num_bits=8, strategy="block", block_structure=[16, 64])
    yield case("nvfp4", "nvfp4-pack-quantized", type="float", num_bits=4, strategy="tensor_group", group_size=16)
    yield case("mxfp4", "mxfp4-pack-quantized", type="float", num_bits=4, strategy="group", group_size=32)


def modelopt() -> Iterator[Case]:
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    config = {"quant_method": "modelopt", "producer": {"name": "modelopt", "version": "0.47.0"}}
    made, scale, second = NVFP4QTensor.quantize(weights(), 16)
    values = made.dequantize(torch.float32, scale=scale, double_scale=second, block_sizes={-1: 16})
    tensors = {"X.weight": made._quantized_data, "X.weight_scale": scale, "X.weight_scale_2": second}
    yield "nvfp4", config | {"quant_algo": "NVFP4"}, tensors | {"X.input_scale": torch.tensor(0.01)}, values
    for name, algorithm, axis, blocks in (
        ("fp8", "FP8", None, None),
        ("fp8 row", "FP8_PER_CHANNEL_PER_TOKEN", 0, None),
        ("fp8 block", "FP8_PB_WO", None, {-1: 64, -2: 8}),
    ):
        made, scale = FP8QTensor.quantize(weights(), axis=axis, block_sizes=blocks)
        values = made.dequantize(torch.float32, scale=scale, block_sizes=blocks)
        more = {"weight_block_size": [8, 64]} if blocks else {}
        tensors = {"X.weight": made._quantized_data, "X.weight_scale": scale.float()}
        yield name, config | {"quant_algo": algorithm} | more, tensors, values


def bare(root: Path, name: str) -> None:
    """A package of which no __init__ runs, so that one module of it does."""
    for folder, _, files in os.walk(root / name):
        if any(file.endswith(".py") for file in files):
            module = types.ModuleType(os.path.relpath(folder, root).replace(os.sep, "."))
            module.__path__ = [folder]
            sys.modules[module.__name__] = module


def levels(bits: int, group: int, symmetric: bool, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points (out, groups) of weights."""
    blocks = weights(rows=rows).reshape(rows, WIDTH // group, group)
    top = 2**bits - 1
    if symmetric:
        scales = (2 * blocks.abs().amax(-1) / top).half().float()
        return scales, torch.full_like(scales, 2 ** (bits - 1))
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scales = ((high - low) / top).half().float()
    return scales, torch.round(-low / scales).clamp(0, top)


def awq(sources: Path) -> Iterator[Case]:
    bare(sources / "autoawq-0.2.9", "awq")
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    rows = 32  # which words are filled with
    for group in (32, 128):
        linear = torch.nn.Linear(WIDTH, rows, bias=False)
        linear.weight.data = weights(rows=rows)
        scales, zeros = levels(4, group, False, rows)
        made = WQLinear_GEMM.from_linear(linear, 4, group, False, scales.t().contiguous(), zeros.t().contiguous())
        values = dequantize_gemm(made.qweight, made.qzeros, made.scales.float(), 4, group).t()
        config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
        yield f"gemm g{group}", config, {f"X.{k}": v for k, v in made.state_dict().items()}, values
    settings = gptqmodel(sources)
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm, pack_awq

    scales, zeros = levels(4, 32, True, rows)
    codes = torch.round(weights(rows=rows) / spread(scales, 32) + spread(zeros, 32)).clamp(0, 15)
    qweight, qzeros = pack_awq(codes.t().int().contiguous(), zeros.t().int().contiguous(), 4)
    values = dequantize_gemm(qweight, qzeros, scales.t().contiguous(), 4, 32).t()
    tensors = {"X.qweight": qweight, "X.qzeros": qzeros, "X.scales": scales.t().contiguous().half()}
    yield "gptqmodel", told(settings.AWQConfig(bits=4, group_size=32)), tensors, values


def gptqmodel(sources: Path) -> Any:
    """The module of its configs. Of what it takes besides, logbar, device-smi and tokenicer install without CUDA."""
    import re

    sys.modules["pcre"] = re
    bare(sources / "gptqmodel-7.7.0", "gptqmodel")
    from gptqmodel.quantization import config

    return config


def told(config: Any) -> dict[str, Any]:
    """What a config.json says, but for a folder of the machine that it was made on."""
    made = json.loads(json.dumps(config.to_dict(), default=str))
    made["meta"].pop("offload_to_disk_path", None)
    return made


def gptq(sources: Path) -> Iterator[Case]:
    bare(sources / "auto_gptq-0.7.1", "auto_gptq")
    from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear

    rows = 32  # which 3 bits fill words with
    for bits, symmetric in ((4, True), (4, False), (8, True), (2, False), (3, True)):
        scales, zeros = levels(bits, 32, symmetric, rows)
        zeros = zeros.clamp(min=1)  # v1 stores one less
        linear = torch.nn.Linear(WIDTH, rows, bias=False)
        linear.weight.data = weights(rows=rows)
        made = QuantLinear(bits, 32, WIDTH, rows, False, weight_dtype=torch.float32)
        made.pack(linear, scales, zeros, None)
        values = made(torch.eye(WIDTH)).t()
        tensors = {f"X.{k}": v for k, v in made.state_dict().items()} | {"X.scales": made.scales.half()}
        config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, "sym": symmetric,
                  "checkpoint_format": "gptq"}  # fmt: skip
        yield f"v1 {bits} bits{'' if symmetric else ' asymmetric'}", config, tensors, values
    file, settings = sources / "gptqmodel-7.7.0/gptqmodel/nn_modules/qlinear/__init__.py", gptqmodel(sources)
    order = torch.from_numpy(np.random.default_rng(1).permutation(np.arange(WIDTH) // 32).astype(np.int32))
    for name, index in (("v2", torch.arange(WIDTH, dtype=torch.int32) // 32), ("v2 desc_act", order)):
        scales, zeros = levels(4, 32, False, rows)
        linear = torch.nn.Linear(WIDTH, rows, bias=False)
        linear.weight.data = weights(rows=rows)
        made = types.SimpleNamespace(bits=4, pack_factor=8, pack_dtype_bits=32, maxq=15, planar=False, g_idx=index,
                                     pack_np_math_dtype=np.uint32, pack_np_dtype=np.int32)  # fmt: skip
        made.register_buffer = lambda key, value, made=made: setattr(made, key, value)
        function(file, "pack_original")(made, linear, scales, zeros, index)
        scale, zero = scales[:, index.long()], zeros[:, index.long()]
        values = (torch.round((weights(rows=rows) + scale * zero) / scale).clamp(0, 15) - zero) * scale
        tensors = {f"X.{part}": getattr(made, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
        asked = settings.GPTQConfig(bits=4, group_size=32, desc_act=index is order, sym=False, format="gptq_v2")
        yield name, told(asked), tensors, values


def function(file: Path, name: str) -> Callable[..., Any]:
    """One function of a module that does not import here."""
    tree = ast.parse(file.read_text("utf-8"))
    [found] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    from contextlib import nullcontext

    import transformers.pytorch_utils
    from torch.nn.modules.conv import _ConvNd

    limits = types.SimpleNamespace(threadpool_limits=lambda count: nullcontext())
    around = {"t": torch, "nn": torch.nn, "np": np, "math": __import__("math"), "transformers": transformers,
              "_ConvNd": _ConvNd, "THREADPOOLCTL": limits}  # fmt: skip
    exec(textwrap.dedent(ast.unparse(found)), around)
    return around[name]


def bitsandbytes() -> Iterator[Case]:
    import bitsandbytes.functional as bnb

    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            packed, state = bnb.quantize_4bit(weights(), quant_type=kind, blocksize=64, compress_statistics=nested)
            tensors = {"X.weight": packed, **{f"X.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
            config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
                      "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}  # fmt: skip
            yield f"{kind}{' nested' if nested else ''}", config, tensors, bnb.dequantize_4bit(packed, state).float()
    codes, scales, _ = bnb.int8_vectorwise_quant(weights().half())
    tensors = {"X.weight": codes, "X.SCB": scales, "X.weight_format": torch.tensor(0, dtype=torch.uint8)}
    values = bnb.int8_vectorwise_dequant(codes, scales).float()
    yield "int8", {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, tensors, values


def mlx() -> Iterator[Case]:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    w = mx.array(weights().numpy())

    def tensor(array: Any) -> torch.Tensor:
        made = np.array(array)
        return torch.from_numpy(made.view(np.int32)).view(torch.uint32) if made.dtype == np.uint32 else (
            torch.from_numpy(made))  # fmt: skip

    for bits, group in ((2, 32), (3, 64), (4, 32), (4, 64), (5, 64), (6, 64), (8, 128)):
        codes, scales, biases = mx.quantize(w, group_size=group, bits=bits)
        values = mx.dequantize(codes, scales, biases, group_size=group, bits=bits)
        tensors = {"X.weight": tensor(codes), "X.scales": tensor(scales), "X.biases": tensor(biases)}
        yield f"{bits} bits g{group}", {"group_size": group, "bits": bits, "mode": "affine"}, tensors, tensor(values)
    for mode, group, bits in (("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)):
        codes, scales, *_ = mx.quantize(w, group_size=group, bits=bits, mode=mode)
        values = mx.dequantize(codes, scales, group_size=group, bits=bits, mode=mode).astype(mx.float32)
        tensors = {"X.weight": tensor(codes), "X.scales": tensor(scales)}
        yield mode, {"group_size": group, "bits": bits, "mode": mode}, tensors, tensor(values)


def fp8() -> Iterator[Case]:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize
    from transformers.utils.quantization_config import FineGrainedFP8Config

    for block in ((16, 64), (8, 32)):
        asked = FineGrainedFP8Config(weight_block_size=block)
        quantizer = types.SimpleNamespace(quantization_config=asked)
        made = Fp8Quantize(quantizer).convert({"X.weight": weights()})
        codes, scale = made["X.weight"], made["X.weight_scale_inv"]
        full = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
        yield f"block {block[0]}x{block[1]}", config, dict(made), codes.float() * full


def quark() -> Iterator[Case]:
    import quark.torch.quantization.config.config as settings
    from quark.torch.utils import create_pack_method
    from quark.torch.utils.numerics import to_e8m0_uint8

    def config(weight: Any) -> dict[str, Any]:
        layer = settings.QLayerConfig(weight=weight.to_quantization_spec())
        made = settings.QConfig(global_quant_config=layer, exclude=["lm_head"]).to_dict()
        return json.loads(json.dumps(made, default=str)) | {"quant_method": "quark"}

    w = weights()
    each = torch.exp2(torch.floor(torch.log2(w.reshape(ROWS, -1, 32).abs().amax(-1))) - 2)
    grid = e2m1(torch.arange(16, dtype=torch.uint8).reshape(1, -1))[0, ::2]
    nearest = grid[(w / spread(each, 32)).unsqueeze(-1).sub(grid).abs().argmin(-1)]
    pack = create_pack_method("per_group", "fp4")
    tensors = {"X.weight": pack.pack(nearest, True), "X.weight_scale": to_e8m0_uint8(each)}
    values = pack.unpack(tensors["X.weight"], True) * spread(torch.exp2(tensors["X.weight_scale"].float() - 127), 32)
    yield "mxfp4", config(settings.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False)), tensors, values
    for name, spec, axis in (
        ("fp8", settings.FP8E4M3PerTensorSpec(observer_method="min_max", is_dynamic=False), None),
        ("fp8 row", settings.FP8E4M3PerChannelSpec(is_dynamic=False, ch_axis=0), 1),
    ):
        scale = (w.abs().amax() if axis is None else w.abs().amax(axis)) / 448
        column = scale if axis is None else scale[:, None]
        codes = create_pack_method("per_tensor", "fp8_e4m3").pack((w / column).to(torch.float8_e4m3fn), True)
        yield name, config(spec), {"X.weight": codes, "X.weight_scale": scale}, codes.float() * column
    scale, pack = w.abs().amax() / 127, create_pack_method("per_tensor", "int8")
    tensors = {"X.weight": pack.pack(torch.round(w / scale), True), "X.weight_scale": scale}
    tensors["X.weight_zero_point"] = pack.pack(torch.zeros(()), True)
    spec = settings.Int8PerTensorSpec(
        observer_method="min_max", symmetric=True, scale_type="float", round_method="half_even", is_dynamic=False
    )
    yield "int8", config(spec), tensors, pack.unpack(tensors["X.weight"], True) * scale


def write(name: str, cases: Iterator[Case]) -> None:
    arrays: dict[str, np.ndarray] = {}
    told = {}
    for case, config, tensors, values in cases:
        told[case] = {"config": config, "tensors": {}}
        for part, tensor in tensors.items():
            data = tensor.detach().contiguous()
            told[case]["tensors"][part] = [DTYPES[data.dtype], list(data.shape)]
            arrays[f"{case}/{part}"] = data.reshape(-1).view(torch.uint8).numpy() if data.numel() > 1 else (
                data.reshape(1).view(torch.uint8).numpy())  # fmt: skip
        arrays[f"{case}/values"] = values.detach().float().numpy()
    arrays["cases"] = np.frombuffer(json.dumps(told).encode(), np.uint8)
    np.savez_compressed(OUT / name, **arrays)
    print(name, list(told), (OUT / f"{name}.npz").stat().st_size)


def main() -> None:
    sources = Path(sys.argv[1])
    # quantized_compressed_tensors quantized_modelopt quantized_awq quantized_gptq quantized_bitsandbytes quantized_mlx
    # quantized_fp8 quantized_quark
    makers = {
        "compressed_tensors": compressed_tensors,
        "modelopt": modelopt,
        "awq": lambda: awq(sources),
        "gptq": lambda: gptq(sources),
        "bitsandbytes": bitsandbytes,
        "mlx": mlx,
        "fp8": fp8,
        "quark": quark,
    }
    for name in sys.argv[2:] or makers:
        write(f"quantized_{name}", makers[name]())


if __name__ == "__main__":
    main()
