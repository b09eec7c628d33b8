"""Threads of a client: one for its sockets, which nothing may block, and others for what may block."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from queue import SimpleQueue
from typing import Any, TypeVar

log = logging.getLogger(__name__)

JOIN_S = 2.0

_Result = TypeVar("_Result")


class LoopThread:
    """An asyncio loop on a daemon thread of its own."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run_loop, args=(self.loop,), name=name, daemon=True)
        self._thread.start()
        self._is_closed = False

    @property
    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """The result of `work`, which runs on the loop. Not for the loop's own thread."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C, say: nobody waits for it any more
            future.cancel()
            raise

    def close(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`, then end the thread. Waits for that, unless it is called on that thread. Closing twice is nothing."""
        if self._is_closed:
            work.close()
            return
        self._is_closed = True
        task = asyncio.run_coroutine_threadsafe(work, self.loop)
        task.add_done_callback(lambda _: self.loop.call_soon_threadsafe(self.loop.stop))  # called on whichever thread
        if not self.is_current:
            self._thread.join(JOIN_S)


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        loop.run_until_complete(_end_tasks())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def _end_tasks() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()


class SerialThread:
    """Calls what it is given, one after the other. Started when it is first needed.

    A daemon, not a `ThreadPoolExecutor`: whose threads are waited for when the interpreter ends, before anybody could close a client.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def post(self, work: Callable[[], None]) -> None:
        """Call `work` soon, on that thread."""
        self._queue.put(work)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=_work_off, args=(self._queue,), name=self._name, daemon=True)
                self._thread.start()

    def close(self) -> None:
        """End the thread when it has called what it was given. Does not wait for it: a callback may be what closes the client."""
        self._queue.put(None)


def _work_off(queue: SimpleQueue[Callable[[], None] | None]) -> None:
    while (work := queue.get()) is not None:
        try:
            work()
        except Exception:  # user code
            log.exception("a callback failed", extra={"on": threading.current_thread().name})
        del work  # or what it holds, an answer say, would stay until the next one comes
