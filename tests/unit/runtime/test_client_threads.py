"""The threads of a client: started when needed, ended when asked, blocked by nobody."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from functools import partial

import pytest

from adapt.runtime.threads import LoopThread, SerialThread

WAIT_S = 10.0


async def nothing() -> None:
    pass


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_work_runs_on_the_loop_and_its_result_comes_back():
    io = LoopThread("loop under test")

    async def where() -> tuple[str, bool]:
        return threading.current_thread().name, io.is_current

    async def fail() -> None:
        raise KeyError("no")

    assert io.run(where()) == ("loop under test", True) and not io.is_current
    with pytest.raises(KeyError):
        io.run(fail())
    for _ in range(2):  # twice is nothing
        io.close(nothing())
    assert "loop under test" not in names() and io.loop.is_closed()


def test_a_loop_ends_its_tasks_and_its_executor_when_it_is_closed():
    io = LoopThread("loop under test")
    cancelled, entered, gate = threading.Event(), threading.Event(), threading.Event()

    async def linger() -> None:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def begin() -> asyncio.Task:
        asyncio.get_running_loop().run_in_executor(None, lambda: (entered.set(), gate.wait(WAIT_S)))
        return asyncio.get_running_loop().create_task(linger(), name="lingering")

    task = io.run(begin())
    assert entered.wait(WAIT_S)
    threading.Timer(0.1, gate.set).start()
    io.close(nothing())
    assert task.cancelled() and cancelled.is_set() and gate.is_set() and "loop under test" not in names()


def test_closing_on_the_loop_itself_does_not_wait_for_itself():
    io, done = LoopThread("loop under test"), threading.Event()

    async def close() -> None:
        io.close(nothing())
        done.set()

    io.run(close())
    assert done.wait(WAIT_S)


def test_calls_come_in_order_and_failing_ones_stop_nothing(caplog):
    serial, calls, done = SerialThread("serial under test"), [], threading.Event()
    assert "serial under test" not in names()  # not before it is needed

    def fail() -> None:
        raise ValueError("a user's mistake")

    with caplog.at_level(logging.ERROR):
        for work in (lambda: calls.append(serial.is_current), fail, lambda: calls.append(2), done.set):
            serial.post(work)
        serial.close()
        assert done.wait(WAIT_S)
    assert calls == [True, 2] and not serial.is_current
    assert "a user's mistake" in caplog.text


def test_what_has_been_called_is_kept_no_longer():
    class Answer:
        pass

    thread, answer, gone = SerialThread("serial under test"), Answer(), threading.Event()
    weakref.finalize(answer, gone.set)
    thread.post(partial(id, answer))
    del answer
    assert gone.wait(WAIT_S), "it stays until the next one comes"
    thread.close()
