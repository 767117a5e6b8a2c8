"""What reaches the driver, with a driver that writes it down; a GPU's is met by all other tests."""

from __future__ import annotations

import ctypes
import enum
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from numba import cuda
from numba.cuda.cudadrv.driver import CudaAPIError

from atlas.driver_queue import ENTRY_TYPES, DriverQueue


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1


class Driver:
    """Notes calls down.

    Attributes
    ----------
    launches
        Function, grid, stream and the parameter of each.
    copies
        Arguments of each.
    result
        What calls return.
    """

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.copies: list[tuple[int, ...]] = []
        self.result = Result.CUDA_SUCCESS

    def CUfunction(self, handle: int) -> str:
        return f"function {handle}"

    def cuLaunchKernel(self, function: Any, *grid: int) -> tuple[Result]:
        *shape, n_shared, stream, parameters, extra = grid
        pointer = ctypes.c_void_p.from_address(parameters).value
        assert pointer is not None
        word = ctypes.c_int64.from_address(pointer).value
        self.launches.append((function, shape, n_shared, stream, word, extra))
        return (self.result,)

    def cuMemcpyAsync(self, *arguments: int) -> tuple[Result]:
        self.copies.append(arguments)
        return (self.result,)


class Entry:
    """A kernel's entry that Numba compiles.

    Attributes
    ----------
    compiled_for
        Types, of each compilation.
    launched
        Launches through Numba.
    """

    __name__ = "entry"

    def __init__(self, handle: int | None) -> None:
        self.compiled_for: list[Any] = []
        self.launched: list[Any] = []
        self._handle = handle

    def compile(self, types: Any) -> Any:
        self.compiled_for.append(types)
        if self._handle is None:
            return SimpleNamespace()  # of another version
        function = SimpleNamespace(handle=self._handle)
        return SimpleNamespace(_codelibrary=SimpleNamespace(get_cufunc=lambda: function))

    def __getitem__(self, grid: Any) -> Any:
        return lambda block: self.launched.append((grid, block))


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads that have asked for a context."""
    asked: list[threading.Thread] = []
    monkeypatch.setattr(cuda, "current_context", lambda: asked.append(threading.current_thread()))
    return asked


def test_an_entry_is_compiled_once_and_launched_with_its_block(
    contexts: list[threading.Thread],
) -> None:
    driver, one, other = Driver(), Entry(77), Entry(78)
    queue = DriverQueue(driver)
    queue.launch(one, 3, 128, 5, 0x7F12_3456_7800)
    queue.launch(other, 1, 32, 6, 16)
    queue.launch(one, 4, 64, 5, 32)
    assert driver.launches == [
        ("function 77", [3, 1, 1, 128, 1, 1], 0, 5, 0x7F12_3456_7800, 0),
        ("function 78", [1, 1, 1, 32, 1, 1], 0, 6, 16, 0),
        ("function 77", [4, 1, 1, 64, 1, 1], 0, 5, 32, 0),
    ]
    assert one.compiled_for == other.compiled_for == [ENTRY_TYPES]
    assert len(contexts) == 1


def test_every_thread_has_the_context(contexts: list[threading.Thread]) -> None:
    queue = DriverQueue(Driver())
    for _ in range(2):
        thread = threading.Thread(target=lambda: queue.copy(1, 2, 3, 4))
        thread.start()
        thread.join()
    queue.copy(1, 2, 3, 4)
    queue.launch(Entry(1), 1, 1, 0, 0)
    assert len(contexts) == len(set(contexts)) == 3


@pytest.mark.usefixtures("contexts")
def test_where_numba_does_not_tell_its_function_it_launches_itself() -> None:
    driver, entry = Driver(), Entry(None)
    queue = DriverQueue(driver)
    for block in (8, 16):
        queue.launch(entry, 3, 128, 5, block)
    assert entry.launched == [((3, 128, 5), 8), ((3, 128, 5), 16)]
    assert driver.launches == []
    assert len(entry.compiled_for) == 1


@pytest.mark.usefixtures("contexts")
def test_what_the_driver_refuses_is_said() -> None:
    driver = Driver()
    queue = DriverQueue(driver)
    driver.result = Result.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(CudaAPIError, match="launch of entry: CUDA_ERROR_INVALID_VALUE"):
        queue.launch(Entry(1), 1, 5000, 0, 0)
    with pytest.raises(CudaAPIError, match="copy of 3 bytes: CUDA_ERROR_INVALID_VALUE"):
        queue.copy(1, 2, 3, 4)
    assert driver.copies == [(1, 2, 3, 4)]
