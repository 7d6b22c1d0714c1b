"""What NCCL is asked for, against a library of Python functions; its exchange needs GPUs."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.tensorrt import nccl
from enginehouse.runtime.tensorrt.nccl import ID_BYTES, Communicator, make_id

ID = bytes(range(128))
HANDLE = 0xC0FFEE


class NcclDouble:
    """libnccl.so.2 as ctypes would call it; result: what every call returns."""

    def __init__(self, result: int = 0) -> None:
        self.result = result
        self.calls: list[tuple[Any, ...]] = []
        self.ncclGetUniqueId = self.get_unique_id
        self.ncclCommInitRank = self.init_rank
        self.ncclCommAbort = lambda comm: self.calls.append(("abort", comm.value))
        self.ncclGetErrorString = lambda code: b"unhandled system error"

    def get_unique_id(self, reference: Any) -> int:
        ctypes.memmove(ctypes.byref(reference._obj), ID, ID_BYTES)
        return self.result

    def init_rank(self, reference: Any, num_ranks: int, unique: Any, rank: int) -> int:
        self.calls.append(("init", num_ranks, bytes(unique), rank))
        reference._obj.value = HANDLE
        return self.result


def library(monkeypatch: pytest.MonkeyPatch, result: int = 0) -> NcclDouble:
    double = NcclDouble(result)
    monkeypatch.setattr(nccl, "_library", lambda: double)
    return double


def test_a_communicator_is_made_of_the_leaders_id_and_ended_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    double = library(monkeypatch)
    assert make_id() == ID
    communicator = Communicator(make_id(), 4, 3)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    assert pointer(communicator.capsule, None) == HANDLE
    communicator.abort()
    communicator.abort()
    assert double.calls == [("init", 4, ID, 3), ("abort", HANDLE)]


def test_a_failure_is_told_in_nccls_words(monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, result=2)
    with pytest.raises(EngineError, match="ncclGetUniqueId fails: unhandled system error; NCCL_"):
        make_id()
    with pytest.raises(EngineError, match="ncclCommInitRank fails: unhandled system error"):
        Communicator(ID, 2, 0)


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "_LIBRARY", "libno_such_nccl.so")
    with pytest.raises(EngineError, match="libno_such_nccl.so cannot be loaded .*; install a CUDA"):
        make_id()


def test_the_librarys_functions_are_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointers are declared as such, or ctypes would cut them to 32 bits."""
    names = ("ncclGetErrorString", "ncclCommInitRank", "ncclCommAbort")
    loaded = SimpleNamespace(**{name: SimpleNamespace() for name in names})
    monkeypatch.setattr(ctypes, "CDLL", lambda name: loaded)
    found = nccl._library()
    assert found.ncclCommAbort.argtypes == [ctypes.c_void_p]
    assert ctypes.sizeof(found.ncclCommInitRank.argtypes[2]) == ID_BYTES
    assert found.ncclGetErrorString.restype is ctypes.c_char_p
