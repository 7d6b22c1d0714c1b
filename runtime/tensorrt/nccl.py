"""NCCL, as far as ranks need it to find each other: a communicator for TensorRT's collectives.

Through ctypes on libnccl.so.2, which torch's CUDA builds bring along; TensorRT opens the same.
Source: NCCL 2, nccl.h.
"""

from __future__ import annotations

import ctypes
from typing import Any

from enginehouse.runtime.errors import EngineError

_LIBRARY = "libnccl.so.2"
ID_BYTES = 128


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * ID_BYTES)]


def _library() -> Any:
    import torch  # its CUDA builds load the library, which is then found by name  # noqa: F401

    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise EngineError(
            f"{_LIBRARY} cannot be loaded ({error}), which ranks exchange through; install a CUDA "
            "build of torch, or NCCL"
        ) from None
    library.ncclGetErrorString.restype = ctypes.c_char_p
    library.ncclCommInitRank.argtypes = [
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_int,
        _UniqueId,
        ctypes.c_int,
    ]
    library.ncclCommAbort.argtypes = [ctypes.c_void_p]
    return library


def _check(library: Any, what: str, result: int) -> None:
    if result != 0:
        words = library.ncclGetErrorString(result).decode()
        raise EngineError(f"NCCL's {what} fails: {words}; NCCL_DEBUG=INFO says more")


def make_id() -> bytes:
    """What one rank makes and all give to their communicator."""
    library, unique = _library(), _UniqueId()
    _check(library, "ncclGetUniqueId", library.ncclGetUniqueId(ctypes.byref(unique)))
    return bytes(unique)


class Communicator:
    """A rank's ncclComm_t, on the current device. Making one waits for all the other ranks.

    capsule: what TensorRT's set_communicator takes; the communicator must outlive its contexts.
    """

    def __init__(self, nccl_id: bytes, num_ranks: int, rank: int) -> None:
        self._library = _library()
        self._comm = ctypes.c_void_p()
        unique = _UniqueId.from_buffer_copy(nccl_id)
        result = self._library.ncclCommInitRank(ctypes.byref(self._comm), num_ranks, unique, rank)
        _check(self._library, "ncclCommInitRank", result)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.capsule = new(self._comm, None, None)

    def abort(self) -> None:
        """Free it, and end what waits for a rank that is gone; from any thread."""
        comm, self._comm = self._comm, ctypes.c_void_p()
        if comm:
            self._library.ncclCommAbort(comm)
