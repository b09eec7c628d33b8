"""Requests one after the other through the public client, for as long as it takes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from functools import partial
from typing import Any

import adapt
from bench.harness.ledger import Ledger

DRAIN_S = 30.0  # for what is under way at the end; what has not ended then is lost


class AdaptStream:
    """Keeps so many requests in flight through the public client, on a thread, and notes how they end."""

    def __init__(self, model: adapt.Model, ledger: Ledger, in_flight: int) -> None:
        self._model, self._ledger = model, ledger
        self._slots = threading.Semaphore(in_flight)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask no more, and wait for what is under way."""
        self._is_over.set()
        self._thread.join()
        limit = time.monotonic() + DRAIN_S
        while self._ledger.open_count and time.monotonic() < limit:
            time.sleep(0.05)

    def _run(self) -> None:
        while not self._is_over.is_set():
            if self._slots.acquire(timeout=0.05):
                number, value = self._ledger.ask(time.monotonic())
                self._model.submit(value).add_done_callback(partial(self._ended, number))

    def _ended(self, number: int, future: Future[Any]) -> None:
        now = time.monotonic()
        if future.cancelled():  # the client was closed: it stays what it was, open
            return
        if (error := future.exception()) is None:
            self._ledger.answered(number, future.result(), now)
        else:
            self._ledger.failed(number, f"{type(error).__name__}: {error}", now)
        self._slots.release()
