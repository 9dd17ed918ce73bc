"""ggml's matrix products, called in the shared library that llama-cpp-python brings."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count, takewhile
from pathlib import Path
from types import SimpleNamespace

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType
from llama_cpp._ctypes_extensions import load_shared_library

from numoe.engine.layers.ops import Floats

logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # it tells of every matrix that is repacked

_P, _SIZE, _INT, _I64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool))


# Result and arguments, as ggml.h, ggml-alloc.h, ggml-backend.h and ggml-cpu.h declare them.
_BASE = {
    "ggml_init": (_P, _InitParams),
    "ggml_free": (None, _P),
    "ggml_tensor_overhead": (_SIZE,),
    "ggml_graph_overhead_custom": (_SIZE, _SIZE, ctypes.c_bool),
    "ggml_new_graph_custom": (_P, _P, _SIZE, ctypes.c_bool),
    "ggml_build_forward_expand": (None, _P, _P),
    "ggml_new_tensor_2d": (_P, _P, _INT, _I64, _I64),
    "ggml_mul_mat": (_P, _P, _P, _P),
    "ggml_nbytes": (_SIZE, _P),
    "ggml_quantize_chunk": (_SIZE, _INT, _P, _P, _I64, _I64, _I64, _P),
    "ggml_backend_free": (None, _P),
    "ggml_backend_alloc_ctx_tensors": (_P, _P, _P),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, _P, _P),
    "ggml_backend_buffer_free": (None, _P),
    "ggml_backend_buft_name": (ctypes.c_char_p, _P),
    "ggml_backend_tensor_set": (None, _P, _P, _SIZE, _SIZE),
    "ggml_backend_tensor_get": (None, _P, _P, _SIZE, _SIZE),
    "ggml_backend_graph_compute": (_INT, _P, _P),
    "ggml_backend_get_device": (_P, _P),
    "ggml_backend_dev_backend_reg": (_P, _P),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, _P, _P),
    "ggml_backend_reg_get_proc_address": (_P, _P, ctypes.c_char_p),
}
_CPU = {
    "ggml_backend_cpu_init": (_P,),
    "ggml_backend_cpu_set_n_threads": (None, _P, _INT),
    "ggml_backend_cpu_buffer_type": (_P,),
}


def _library() -> SimpleNamespace:
    """The functions above, by name."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    found = SimpleNamespace()
    for file, functions in (("ggml-base", _BASE), ("ggml-cpu", _CPU)):
        library = load_shared_library(file, folder)
        for name, (result, *arguments) in functions.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(found, name, function)
    return found


ggml = _library()


class NoRepacking(Exception):
    """ggml has no order of its own for weights of this format on this processor."""


class Products:
    """Products of copies of a matrix with a vector, as one graph: w (out, in), x (1, in) float32.

    The weights are rounded to the format `kind`. `repacked`: in ggml's own order for this processor; raises
    NoRepacking where it has none for the format.
    """

    def __init__(
        self, kind: GGMLQuantizationType, w: Floats, x: Floats, copies: int, threads: int, repacked: bool
    ) -> None:
        rows, columns = w.shape
        self._rows, self._weights = rows, copies * rows * columns
        with ExitStack() as stack:
            backend = ggml.ggml_backend_cpu_init()
            stack.callback(ggml.ggml_backend_free, backend)
            ggml.ggml_backend_cpu_set_n_threads(backend, threads)
            nodes = 2 * copies + 16
            overhead = nodes * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(nodes, False)
            contexts = []
            for _ in range(2):
                contexts.append(ggml.ggml_init(_InitParams(overhead, None, True)))
                stack.callback(ggml.ggml_free, contexts[-1])
            held, computed = contexts

            matrices = [ggml.ggml_new_tensor_2d(held, kind, columns, rows) for _ in range(copies)]
            place = _repacking(backend) if repacked else ggml.ggml_backend_cpu_buffer_type()
            memory = ggml.ggml_backend_alloc_ctx_tensors_from_buft(held, place)
            stack.callback(ggml.ggml_backend_buffer_free, memory)
            vector = ggml.ggml_new_tensor_2d(computed, 0, columns, 1)
            graph = ggml.ggml_new_graph_custom(computed, nodes, False)
            results = [ggml.ggml_mul_mat(computed, matrix, vector) for matrix in matrices]
            for result in results:
                ggml.ggml_build_forward_expand(graph, result)
            memory = ggml.ggml_backend_alloc_ctx_tensors(computed, backend)
            stack.callback(ggml.ggml_backend_buffer_free, memory)
            if not ggml.ggml_backend_dev_supports_op(ggml.ggml_backend_get_device(backend), results[0]):
                raise NoRepacking(kind.name)

            codes = np.empty(ggml.ggml_nbytes(matrices[0]), np.uint8)
            ggml.ggml_quantize_chunk(kind, w.ctypes.data, codes.ctypes.data, 0, rows, columns, None)
            for matrix in matrices:
                ggml.ggml_backend_tensor_set(matrix, codes.ctypes.data, 0, codes.nbytes)
            ggml.ggml_backend_tensor_set(vector, x.ctypes.data, 0, x.nbytes)
            self._backend, self._graph, self._last = backend, graph, results[-1]
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Give the memory back."""
        self._stack.close()

    def __iter__(self) -> Iterator[int]:
        """Compute all of them, again and again; yields counts of weights."""
        while True:
            if ggml.ggml_backend_graph_compute(self._backend, self._graph):
                raise RuntimeError("ggml could not compute the products")
            yield self._weights

    def result(self) -> Floats:
        """w x of the last copy, (out,)."""
        out = np.empty(self._rows, np.float32)
        ggml.ggml_backend_tensor_get(self._last, out.ctypes.data, 0, out.nbytes)
        return out


def _repacking(backend: int) -> int:
    """The kind of memory that weights are repacked in."""
    device = ggml.ggml_backend_get_device(backend)
    registry = ggml.ggml_backend_dev_backend_reg(device)
    listing = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    # An array of pointers that ends with a null pointer.
    kinds = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(listing)(device) if listing else [None]
    for kind in takewhile(bool, map(kinds.__getitem__, count())):
        if b"REPACK" in ggml.ggml_backend_buft_name(kind):
            return kind
    raise NoRepacking("this build of ggml")
