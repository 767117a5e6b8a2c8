"""What reaches the driver, with a driver that writes it down; a GPU's is met by all other tests."""

from __future__ import annotations

import ctypes
import enum
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from numba import cuda, types
from numba.cuda.cudadrv.driver import CudaAPIError

from atlas.driver_queue import DriverQueue


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1


class Driver:
    """Notes calls down.

    Attributes
    ----------
    launches
        Function, grid, stream and the parameters of each.
    copies
        Arguments of each.
    n_words
        Parameters of its kernels.
    result
        What calls return.
    """

    def __init__(self, n_words: int = 2) -> None:
        self.n_words = n_words
        self.launches: list[tuple[Any, ...]] = []
        self.copies: list[tuple[int, ...]] = []
        self.result = Result.CUDA_SUCCESS

    def CUfunction(self, handle: int) -> str:
        return f"function {handle}"

    def cuLaunchKernel(self, function: Any, *grid: int) -> tuple[Result]:
        *shape, n_shared, stream, parameters, extra = grid
        pointers = (ctypes.c_uint64 * self.n_words).from_address(parameters)
        words = [ctypes.c_uint64.from_address(pointer).value for pointer in pointers]
        self.launches.append((function, shape, n_shared, stream, words, extra))
        return (self.result,)

    def cuMemcpyAsync(self, *arguments: int) -> tuple[Result]:
        self.copies.append(arguments)
        return (self.result,)


class Launched:
    """A kernel that Numba compiles, and its entry.

    Attributes
    ----------
    compiled_for
        Types, of each compilation.
    launched
        Launches through Numba.
    """

    name = "launched_kernel"

    def __init__(self, handle: int | None, n_words: int = 2) -> None:
        self.entry = self
        self.entry_types = (types.int64,) * n_words
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
        return lambda *words: self.launched.append((grid, words))


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads that have asked for a context."""
    asked: list[threading.Thread] = []
    monkeypatch.setattr(cuda, "current_context", lambda: asked.append(threading.current_thread()))
    return asked


def test_a_kernel_is_compiled_once_and_launched_with_its_words(
    contexts: list[threading.Thread],
) -> None:
    driver, one, other = Driver(), Launched(77), Launched(78)
    queue = DriverQueue(driver)
    queue.launch(one, 3, 128, 5, [0x7F12_3456_7800, 2**64 - 1])
    queue.launch(other, 1, 32, 6, [16, 1])
    queue.launch(one, 4, 64, 5, [32, 0])
    assert driver.launches == [
        ("function 77", [3, 1, 1, 128, 1, 1], 0, 5, [0x7F12_3456_7800, 2**64 - 1], 0),
        ("function 78", [1, 1, 1, 32, 1, 1], 0, 6, [16, 1], 0),
        ("function 77", [4, 1, 1, 64, 1, 1], 0, 5, [32, 0], 0),
    ]
    assert one.compiled_for == other.compiled_for == [(types.int64, types.int64)]
    assert len(contexts) == 1


@pytest.mark.usefixtures("contexts")
def test_a_grid_may_have_two_dimensions() -> None:
    driver, known, unknown = Driver(), Launched(77), Launched(None)
    queue = DriverQueue(driver)
    for kernel in (known, unknown):
        queue.launch(kernel, (3, 4), 128, 5, [1, 2])
    assert driver.launches == [("function 77", [3, 4, 1, 128, 1, 1], 0, 5, [1, 2], 0)]
    assert unknown.launched == [(((3, 4), 128, 5), (1, 2))]


@pytest.mark.usefixtures("contexts")
def test_kernels_of_any_number_of_words_are_launched_in_turns() -> None:
    driver = Driver()
    queue = DriverQueue(driver)
    kernels = {n: Launched(n, n) for n in (1, 7, 60)}
    for n in (7, 60, 1, 60, 7):
        driver.n_words = n
        queue.launch(kernels[n], 1, 32, 5, range(n))
        assert driver.launches[-1][4] == list(range(n))


@pytest.mark.usefixtures("contexts")
def test_a_thread_overwrites_no_other_threads_words() -> None:
    driver, kernel = Driver(), Launched(1)
    queue = DriverQueue(driver)
    take = driver.cuLaunchKernel

    def interrupted(*arguments: Any) -> tuple[Result]:
        driver.cuLaunchKernel = take  # type: ignore[method-assign]
        thread = threading.Thread(target=lambda: queue.launch(kernel, 1, 32, 6, [8, 9]))
        thread.start()
        thread.join()
        return take(*arguments)

    driver.cuLaunchKernel = interrupted  # type: ignore[method-assign]
    queue.launch(kernel, 1, 32, 5, [1, 2])
    assert [launch[4] for launch in driver.launches] == [[8, 9], [1, 2]]


def test_every_thread_has_the_context(contexts: list[threading.Thread]) -> None:
    queue = DriverQueue(Driver())
    for _ in range(2):
        thread = threading.Thread(target=lambda: queue.copy(1, 2, 3, 4))
        thread.start()
        thread.join()
    queue.copy(1, 2, 3, 4)
    queue.launch(Launched(1), 1, 1, 0, [0, 0])
    assert len(contexts) == len(set(contexts)) == 3


@pytest.mark.usefixtures("contexts")
def test_where_numba_does_not_tell_its_function_it_launches_itself() -> None:
    driver, kernel = Driver(), Launched(None)
    queue = DriverQueue(driver)
    for words in ([8, 2**64 - 1], [16, 2**63 - 1]):
        queue.launch(kernel, 3, 128, 5, words)
    # As Numba takes them for what the kernel has been compiled for.
    assert kernel.launched == [((3, 128, 5), (8, -1)), ((3, 128, 5), (16, 2**63 - 1))]
    assert driver.launches == []
    assert len(kernel.compiled_for) == 1


@pytest.mark.usefixtures("contexts")
def test_what_the_driver_refuses_is_said() -> None:
    driver = Driver()
    queue = DriverQueue(driver)
    driver.result = Result.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(CudaAPIError, match="launch of launched_kernel: CUDA_ERROR_INVALID_VALUE"):
        queue.launch(Launched(1), 1, 5000, 0, [0, 0])
    with pytest.raises(CudaAPIError, match="copy of 3 bytes: CUDA_ERROR_INVALID_VALUE"):
        queue.copy(1, 2, 3, 4)
    assert driver.copies == [(1, 2, 3, 4)]
