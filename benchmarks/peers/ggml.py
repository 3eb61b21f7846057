"""llama.cpp's ggml, through the C interface of the libraries inside llama-cpp-python.

Its weights go where llama.cpp would put them: into the buffer that repacks for this processor's
instructions where that takes the type, else as they are.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from ctypes import CDLL, POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t
from ctypes import c_void_p as Pointer
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers import Contender, Layer, Problem, repeated

F32, Q4_0, Q8_0, Q4_K = 0, 2, 8, 12  # enum ggml_type
FORMS = {
    "ggml Q4_0": (4, Q4_0, "weights symmetric, blocks of 32"),
    "ggml Q4_K": (4, Q4_K, "weights with minima, blocks of 32 in 256"),
    "ggml Q8_0": (8, Q8_0, "weights symmetric, blocks of 32"),
}
GRAPH_BYTES = 1 << 20  # tensor headers and one graph
BUFFER_OFFSET = 8  # of `buffer` in struct ggml_tensor


class InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", Pointer), ("no_alloc", c_bool))


SILENT = ctypes.CFUNCTYPE(None, c_int, c_char_p, Pointer)(lambda level, text, user: None)

# name -> result, arguments
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_version": (c_char_p, []),
    "ggml_log_set": (None, [Pointer] * 2),
    "ggml_init": (Pointer, [InitParams]),
    "ggml_new_tensor_2d": (Pointer, [Pointer, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (Pointer, [Pointer] * 3),
    "ggml_new_graph": (Pointer, [Pointer]),
    "ggml_build_forward_expand": (None, [Pointer] * 2),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, POINTER(c_float), Pointer, c_int64, c_int64, c_int64, Pointer],
    ),
    "ggml_backend_cpu_reg": (Pointer, []),
    "ggml_backend_cpu_init": (Pointer, []),
    "ggml_backend_cpu_set_n_threads": (None, [Pointer, c_int]),
    "ggml_backend_cpu_buffer_type": (Pointer, []),
    "ggml_backend_reg_dev_get": (Pointer, [Pointer, c_size_t]),
    "ggml_backend_reg_get_proc_address": (Pointer, [Pointer, c_char_p]),
    "ggml_backend_buft_alloc_buffer": (Pointer, [Pointer, c_size_t]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (Pointer, [Pointer] * 2),
    "ggml_backend_dev_supports_op": (c_bool, [Pointer] * 2),
    "ggml_backend_buffer_get_base": (Pointer, [Pointer]),
    "ggml_backend_tensor_alloc": (c_int, [Pointer] * 3),
    "ggml_backend_tensor_set": (None, [Pointer, Pointer, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [Pointer, Pointer, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [Pointer] * 2),
}


class Library:
    """The functions above, found in the libraries of the installed package."""

    def __init__(self, folder: Path) -> None:
        ending = "dylib" if sys.platform == "darwin" else "so"
        loaded = [
            CDLL(str(folder / f"lib{name}.{ending}"), ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml-cpu", "ggml")
        ]
        for name, (result, arguments) in FUNCTIONS.items():
            function = next(getattr(one, name) for one in loaded if hasattr(one, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)  # for type checkers: functions are set above


@cache
def library() -> Library:
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise ImportError("No module named 'llama_cpp'")
    loaded = Library(Path(package.origin).parent / "lib")
    loaded.ggml_log_set(SILENT, None)  # a line for every tensor repacked
    return loaded


def contenders() -> list[Contender]:
    version = library().ggml_version().decode()
    return [
        Contender(
            name, bits, f"ggml {version}: {what}; activations int8 by block", partial(prepare, kind)
        )
        for name, (bits, kind, what) in FORMS.items()
    ]


def context() -> int:
    return library().ggml_init(InitParams(GRAPH_BYTES, None, True))


class Ready(NamedTuple):
    """A graph for each copy of the weight; all write the same result."""

    graphs: dict[int, int]
    result: int
    shape: tuple[int, int]


def prepare(kind: int, problem: Problem) -> Layer:
    g = library()
    k, n = problem.k, problem.n
    if k % (256 if kind == Q4_K else 32):
        raise ValueError(f"K = {k} is no multiple of its block of 256")
    backend = g.ggml_backend_cpu_init()
    g.ggml_backend_cpu_set_n_threads(backend, problem.threads)

    row_bytes = g.ggml_row_size(kind, k)
    rows = np.empty((len(problem.rows), row_bytes), np.uint8)
    source = np.ascontiguousarray(problem.rows).ctypes.data_as(POINTER(c_float))
    g.ggml_quantize_chunk(kind, source, rows.ctypes.data, 0, len(rows), k, None)
    packed = repeated(rows, problem.repeats)

    where = buffer_type(kind, problem)
    copies = []
    for _ in range(problem.copies(packed.nbytes)):
        memory = context()
        weight = g.ggml_new_tensor_2d(memory, kind, k, n)
        if not g.ggml_backend_alloc_ctx_tensors_from_buft(memory, where):
            raise MemoryError(f"ggml could not allocate {packed.nbytes} bytes")
        g.ggml_backend_tensor_set(weight, packed.ctypes.data, 0, packed.nbytes)
        copies.append(weight)

    def bind(x: np.ndarray) -> Ready:
        memory = context()
        tensor = g.ggml_new_tensor_2d(memory, F32, k, len(x))
        if not g.ggml_backend_alloc_ctx_tensors_from_buft(memory, cpu_buffer_type()):
            raise MemoryError("ggml could not allocate the activations")
        g.ggml_backend_tensor_set(tensor, x.ctypes.data, 0, x.nbytes)
        results = g.ggml_backend_buft_alloc_buffer(cpu_buffer_type(), 4 * len(x) * n)
        graphs = {}
        for weight in copies:
            memory = context()
            product = g.ggml_mul_mat(memory, weight, tensor)
            g.ggml_backend_tensor_alloc(results, product, g.ggml_backend_buffer_get_base(results))
            graphs[weight] = g.ggml_new_graph(memory)
            g.ggml_build_forward_expand(graphs[weight], product)
        return Ready(graphs, product, (len(x), n))

    def run(weight: int, ready: Ready) -> Ready:
        status = g.ggml_backend_graph_compute(backend, ready.graphs[weight])
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return ready

    return Layer(packed.nbytes, copies, bind, run, output)


def output(ready: Ready) -> np.ndarray:
    y = np.empty(ready.shape, np.float32)
    library().ggml_backend_tensor_get(ready.result, y.ctypes.data, 0, y.nbytes)
    return y


def cpu_buffer_type() -> int:
    return library().ggml_backend_cpu_buffer_type()


def buffer_type(kind: int, problem: Problem) -> int:
    """The first of the processor's special buffer types that multiplies by such a weight."""
    g = library()
    registry = g.ggml_backend_cpu_reg()
    device = g.ggml_backend_reg_dev_get(registry, 0)
    address = g.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    found = ctypes.CFUNCTYPE(POINTER(Pointer), Pointer)(address)(device) if address else None
    i = 0
    while found and found[i]:
        memory = context()
        weight = g.ggml_new_tensor_2d(memory, kind, problem.k, problem.n)
        x = g.ggml_new_tensor_2d(memory, F32, problem.k, 512)
        empty = g.ggml_backend_buft_alloc_buffer(found[i], 0)
        Pointer.from_address(weight + BUFFER_OFFSET).value = empty  # as llama.cpp asks
        if g.ggml_backend_dev_supports_op(device, g.ggml_mul_mat(memory, weight, x)):
            return found[i]
        i += 1
    return cpu_buffer_type()
