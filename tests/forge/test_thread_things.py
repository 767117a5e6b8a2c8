"""Things of threads: apart while threads run, and handed on when they end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from forge.buffers import forget_scratch, scratch
from forge.thread_things import ThreadThings


def in_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_threads_that_run_have_things_of_their_own() -> None:
    things = ThreadThings()
    things.mine()["who"] = "here"
    both = threading.Barrier(2)

    def work(who: str) -> str:
        things.mine()["who"] = who
        both.wait(60)
        found: str = things.mine()["who"]
        both.wait(60)
        return found

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, ["one", "two"])) == ["one", "two"]
    assert things.mine() == {"who": "here"}


def test_things_go_to_the_next_thread() -> None:
    things = ThreadThings()
    found: list[dict[str, int]] = []
    for number in range(3):
        in_a_thread(lambda n=number: (found.append(dict(things.mine())), things.mine().update(n=n)))  # type: ignore[misc]
    assert found == [{}, {"n": 0}, {"n": 1}]
    assert things.mine() == {"n": 2} and things.mine() is things.mine()


def test_few_are_kept_for_nobody() -> None:
    things = ThreadThings()
    barrier = threading.Barrier(9)
    with ThreadPoolExecutor(9) as pool:
        list(pool.map(lambda n: (things.mine().update(n=n), barrier.wait(60)), range(9)))
    assert len(things._left) == 4


def test_things_can_be_forgotten() -> None:
    things = ThreadThings()
    in_a_thread(lambda: things.mine().update(n=1))
    assert things.mine() == {"n": 1}  # taken over
    in_a_thread(lambda: things.mine().update(n=2))
    things.forget()
    assert things.mine() == {}
    found: list[dict[str, int]] = []
    in_a_thread(lambda: found.append(things.mine()))
    assert found == [{}]


def test_scratch_memory_is_used_again_and_can_be_given_back() -> None:
    places: list[int] = []

    def work() -> None:
        memory = scratch("work", 100_000)
        memory[:] = 1
        places.append(memory.__array_interface__["data"][0])

    forget_scratch()
    here = scratch("work", 100_000)
    here[:] = 2
    for _ in range(2):
        in_a_thread(work)
    assert places[0] == places[1] != here.__array_interface__["data"][0]
    assert (here == 2).all() and scratch("work", 10).base is here.base
    forget_scratch()
    assert not np.shares_memory(scratch("work", 10), here)
