"""Which tensors of a checkpoint make a weight, and what its config says about that.

A `Convention` is what a config names: spellings of one library, a file beside this one. Without any the weights are

    X.weight in F32, F64, F16 or BF16, and integers           themselves
    X.weight (F8_E4M3) + X.weight_scale_inv and others        fp8, see `fp8`
    X.weight (I8)      + X.scale (F8_E8M0)                    mxfp4: two e2m1 values a byte, groups of 32
    X_blocks (U8)      + X_scales                             mxfp4 as gpt-oss stores it; its name here is X
    X.weight (I8)      + X.scale (F16) [+ X.minimum (F16)]    numoe's int8: (out, in), scales (out, in / group)
    X.weight (U8)      + X.scale (F16) [+ X.minimum (F16)]    numoe's int4: (out, in / 2) in the order of `INT4`

All but the fourth say Y_scale and Y_minimum beside a Y that does not end in .weight. In folders that numoe wrote
scales and minimums may be F32, and there is what `own` adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from numoe.quant.errors import InputError
from numoe.quant.files import Files, TensorInfo
from numoe.quant.formats.format import Format
from numoe.quant.formats.integer import integer_format
from numoe.quant.formats.mxfp4 import MX_GROUP, MXFP4
from numoe.quant.stored.conventions.announced import Announced
from numoe.quant.stored.conventions.auto_round import read_auto_round
from numoe.quant.stored.conventions.awq import read_awq
from numoe.quant.stored.conventions.bitsandbytes import read_bitsandbytes
from numoe.quant.stored.conventions.compressed_tensors import read_compressed_tensors
from numoe.quant.stored.conventions.fp8 import read_fp8, spellings
from numoe.quant.stored.conventions.gptq import read_gptq
from numoe.quant.stored.conventions.mlx import read_mlx
from numoe.quant.stored.conventions.modelopt import read_modelopt
from numoe.quant.stored.conventions.native import FORMATS, Grouped, Microscaled, Numbers, Slabs, companion
from numoe.quant.stored.conventions.own import OWN, blocks
from numoe.quant.stored.conventions.quark import read_quark
from numoe.quant.stored.conventions.spelling import Convention
from numoe.quant.stored.gguf_blocks import Blocks
from numoe.quant.stored.handle import Stored
from numoe.quant.stored.safetensors import DTYPE_BITS

PLAIN = Convention("FP8", spellings(((128, 128),)))
"""That of a config that names none."""

_READERS: Mapping[str, Callable[[Announced], Convention]] = {
    "auto-round": read_auto_round,
    "awq": read_awq,
    "bitsandbytes": read_bitsandbytes,
    "compressed-tensors": read_compressed_tensors,
    "fbgemm_fp8": read_fp8,
    "fp8": read_fp8,
    "gptq": read_gptq,
    "intel/auto-round": read_auto_round,
    "modelopt": read_modelopt,
    "quark": read_quark,
}
_E8M0 = ("F8_E8M0", "U8")


def read_convention(config: Announced) -> Convention | None:
    """What a quantization config says; None where its method is not known.

    Raises:
        InputError: it asks for what is not computed.
    """
    if config.below("quantization").values and "producer" in config.values:  # a copy of ModelOpt's own file
        config = config.below("quantization")
    method = config.get("quant_method", str)
    if method == "mxfp4" and not config.values.keys() - {"quant_method", "modules_to_not_convert"}:
        return PLAIN  # gpt-oss's blocks and scales, which the tensors' names tell
    if config.values.get("quant_algo") or config.values.get("moe_quant_algo"):
        return read_modelopt(config)
    if method is None and "config_groups" in config.values:
        return read_compressed_tensors(config)
    if method is None and "group_size" in config.values:
        return read_mlx(config)
    reader = _READERS.get(method or "")
    return None if reader is None else reader(config)


@dataclass(frozen=True)
class Conventions:
    """The weights among tensors, and which kind of `Stored` each is; `by_columns` tells of `native.LAYOUT`."""

    tensors: Mapping[str, TensorInfo]
    files: Files
    convention: Convention
    by_columns: bool

    def names(self) -> Iterator[str]:
        """Those of the weights, in stored order; scales belong to their weight and are not listed."""
        for name in self.tensors:
            if name not in self._folded:
                yield self._folded_into.get(name, name)

    def __contains__(self, name: object) -> bool:
        """Whether there is a weight by a name, or codes of one."""
        return isinstance(name, str) and (
            name in self.tensors or f"{name}_blocks" in self.tensors or self._convention.begun(name, self.tensors)
        )

    def find(self, name: str) -> Stored | None:
        """The weight by a name. Raises InputError where its codes and scales do not fit each other."""
        found = self._convention.find(name, self.tensors, self.files)
        if found is not None:
            return found
        info = self.tensors.get(name)
        if info is not None:
            scales = self._scales_of(info)
            if scales is None:
                return self._unscaled(info)
            if scales.dtype in self._own_scales:
                return self._grouped(info, scales)
            return self._mxfp4(name, info, scales, (*info.shape[:-1], 2 * info.shape[-1] if info.shape else 0))
        blocks, scales = self.tensors.get(f"{name}_blocks"), self.tensors.get(f"{name}_scales")
        if blocks is None or scales is None:
            self._refuse_incomplete(name)
            return None
        if blocks.shape[-1:] != (MX_GROUP // 2,) or len(blocks.shape) < 3:
            raise InputError(f"{blocks.path}: {blocks.name!r} has the shape {blocks.shape}, not (.., out, in/32, 16)")
        return self._mxfp4(name, blocks, scales, (*blocks.shape[:-2], MX_GROUP * blocks.shape[-2]))

    @cached_property
    def _convention(self) -> Convention:
        """Of what numoe wrote fp8 alone is as it was."""
        if not self.by_columns:
            return self.convention
        fp8 = tuple(one for one in self.convention.spellings if one.dtypes == ("F8_E4M3",))
        return Convention("numoe", (*(fp8 or PLAIN.spellings), *OWN, *blocks(self.tensors)))

    def _refuse_incomplete(self, name: str) -> None:
        if error := self._convention.incomplete(name, self.tensors):
            raise error

    @cached_property
    def _claims(self) -> dict[str, tuple[str, ...]]:
        return dict(self._convention.claims(self.tensors))

    @cached_property
    def _folded_into(self) -> dict[str, str]:
        # Codes and the weight that they are, where that has another name.
        renamed = {parts[0]: weight for weight, parts in self._claims.items()}
        codes = {name: name.removesuffix("_blocks") for name in self.tensors if name.endswith("_blocks")}
        return renamed | {name: weight for name, weight in codes.items() if f"{weight}_scales" in self.tensors}

    @cached_property
    def _folded(self) -> frozenset[str]:
        folded = {f"{weight}_scales" for name, weight in self._folded_into.items() if name.endswith("_blocks")}
        folded |= {name for _, *parts in self._claims.values() for name in parts}
        if self._convention.dropped:
            folded |= {name for name in self.tensors if name.endswith(self._convention.dropped)}
        for info in self.tensors.values():
            if info.dtype == "NVFP4":  # of GGUF; activations are not scaled here
                folded |= {companion(info.name, part) for part in ("scale", "input_scale")} & self.tensors.keys()
            scales = self._scales_of(info)
            if scales is not None:
                folded.add(scales.name)
                if (minimum := self._minimum_of(info, scales)) is not None:
                    folded.add(minimum.name)
        return frozenset(folded)

    def _scales_of(self, info: TensorInfo) -> TensorInfo | None:
        if info.dtype not in ("I8", "U8"):
            return None
        found = self.tensors.get(companion(info.name, "scale"))
        # A U8 tensor is int4 codes only beside numoe's own scales.
        return None if found is not None and info.dtype == "U8" and found.dtype not in self._own_scales else found

    @property
    def _own_scales(self) -> tuple[str, ...]:
        return ("F16", "F32") if self.by_columns else ("F16",)

    def _minimum_of(self, info: TensorInfo, scales: TensorInfo) -> TensorInfo | None:
        return self.tensors.get(companion(info.name, "minimum")) if scales.dtype in self._own_scales else None

    def _unscaled(self, info: TensorInfo) -> Stored:
        # GGUF's plain types have the names of safetensors' dtypes; all others of GGUF pack weights in blocks.
        if info.dtype not in DTYPE_BITS:
            return Blocks.of(self.files, info, self.tensors.get(companion(info.name, "scale")))
        self._refuse_incomplete(info.name)
        format = FORMATS.get(info.dtype) or Format(info.dtype.lower(), DTYPE_BITS[info.dtype])
        return Numbers(self.files, info.name, (info,), info.shape, format)

    def _mxfp4(self, name: str, info: TensorInfo, scales: TensorInfo, shape: tuple[int, ...]) -> Stored:
        if shape[-1] % MX_GROUP:
            raise InputError(f"{info.path}: the rows of {info.name!r} hold {shape[-1]} values, not a multiple of 32")
        self._check_scales(info, scales, (*shape[:-1], shape[-1] // MX_GROUP), _E8M0)
        kind = self._kind(Microscaled, shape, MXFP4.format)
        return kind(self.files, name, (info, scales), shape, MXFP4.format)

    def _grouped(self, info: TensorInfo, scales: TensorInfo) -> Stored:
        bits = 4 if info.dtype == "U8" else 8
        width = info.shape[-1] * 8 // bits if len(info.shape) > 1 else 0
        groups = scales.shape[-1] if scales.shape else 0
        if groups < 1 or width % (2 * groups):
            raise InputError(
                f"{info.path}: {info.name!r} of shape {info.shape} does not divide into even groups by the scales "
                f"{scales.name!r} of shape {scales.shape}; convert or download the model again"
            )
        minimum = self._minimum_of(info, scales)
        factors = (scales,) if minimum is None else (scales, minimum)
        for stored in factors:
            self._check_scales(info, stored, (*info.shape[:-1], groups), (scales.dtype,))
        shape = (*info.shape[:-1], width)
        format = integer_format(bits, width // groups, DTYPE_BITS[scales.dtype], minimum is not None)
        return self._kind(Grouped, shape, format)(self.files, info.name, (info, *factors), shape, format)

    def _kind(self, by_rows: type[Stored], shape: tuple[int, ...], format: Format) -> type[Stored]:
        return Slabs if self.by_columns and len(shape) == 2 and format.by_columns(shape[0]) else by_rows

    def _check_scales(
        self, info: TensorInfo, scales: TensorInfo, shape: tuple[int, ...], dtypes: tuple[str, ...]
    ) -> None:
        if scales.shape != shape or scales.dtype not in dtypes:
            raise InputError(
                f"{scales.path}: {scales.name!r} is {scales.dtype} {scales.shape} where {info.name!r} "
                f"{info.shape} needs {' or '.join(dtypes)} {shape}; check the block size in the config"
            )
