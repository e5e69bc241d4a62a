"""The lock that is lent between steps: whoever waits gets in, in order, and one at a time."""

from __future__ import annotations

import threading
import time

import pytest

from lora_core.turnstile import Turnstile


def waiting(turnstile: Turnstile, number: int) -> None:
    deadline = time.monotonic() + 10
    while len(turnstile._queue) < number:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_those_who_wait_go_through_in_order_before_the_holder_goes_on() -> None:
    turnstile, went = Turnstile(), list[object]()

    def visitor(number: int) -> None:
        with turnstile:
            went.append(number)

    threads = []
    with turnstile:
        for number in range(4):
            threads.append(threading.Thread(target=visitor, args=(number,)))
            threads[-1].start()
            waiting(turnstile, number + 1)
        went.append("step 1")
        turnstile.lend()
        went.append("step 2")
        turnstile.lend()  # nobody waits: at once
        went.append("step 3")
    for thread in threads:
        thread.join()
    assert went == ["step 1", 0, 1, 2, 3, "step 2", "step 3"]


def test_one_at_a_time_under_pressure() -> None:
    turnstile, inside, worst, times = Turnstile(), 0, 0, 0

    def work() -> None:
        nonlocal inside, worst, times
        for _ in range(200):
            with turnstile, turnstile:  # reentrant
                inside += 1
                worst = max(worst, inside)
                times += 1
                inside -= 1
                turnstile.lend()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (worst, times, inside) == (1, 1200, 0)
    assert not turnstile._queue


def test_an_endless_stream_of_visitors_does_not_keep_the_holder_out() -> None:
    turnstile, over = Turnstile(), threading.Event()

    def visitors() -> None:
        while not over.is_set():
            with turnstile:
                pass

    threads = [threading.Thread(target=visitors) for _ in range(3)]
    with turnstile:
        for thread in threads:
            thread.start()
        waiting(turnstile, 3)
        for _ in range(100):
            turnstile.lend()
        over.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_only_the_holder_lends() -> None:
    with pytest.raises(RuntimeError, match="holder"):
        Turnstile().lend()
