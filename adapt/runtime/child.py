"""Work in a child process that answers once: for what must not burden its parent, or must not share anything with it.

    parent   ask("adapt.runtime.builder", request) ──stdin──▶ one line of JSON; then nothing, but kept open
    child    python -m adapt.runtime.builder, whose main is answer(work)
               ──stdout──▶ lines of JSON: {"step": words, "share": done} any number of times, then {"answer": ...} or {"error": ...}
               ──stderr──▶ what libraries print; its end is told where the child dies without a word

Standard input that ends before the work is done means that the parent is gone: the child leaves at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from adapt.errors import AdaptError, ExportError, ExportInterruptedError, ExportUnavailableError

log = logging.getLogger(__name__)

LINE_LIMIT_BYTES = 64 << 20  # of an answer: a million operators' costs
TOLD_BYTES = 2000  # of what the child wrote last, when it dies without a word
READ_BYTES = 1 << 16

Progress = Callable[[str, float | None], None]  # what is being done, and the share of it that is done, if that is known


async def ask(module: str, request: Mapping[str, Any], *, about: str, progress: Progress | None = None) -> dict[str, Any]:
    """The answer of `python -m module` to `request`. However this ends, the child and what it started are dead afterwards.

    Args:
        about: what the child does, for errors: "the export of torchvision/resnet50".

    Raises:
        AdaptError: the one that the child answered with, or an ExportError where it died without an answer.
    """
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # a group of its own, to be killed as one; and Ctrl-C in the terminal is ours to deal with
    )  # fmt: skip
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    told = bytearray()
    listener = asyncio.create_task(_keep_end(child.stderr, told), name=f"{module}-stderr")
    answer: dict[str, Any] | None = None
    try:
        with contextlib.suppress(ConnectionError):  # it died at once: its exit status tells more
            child.stdin.write(json.dumps(request).encode() + b"\n")
            await child.stdin.drain()
        async for line in _lines(child.stdout):
            record = json.loads(line)
            if "step" not in record:
                answer = record
            elif progress is not None:
                progress(record["step"], record["share"])
        status = await child.wait()
    finally:
        if child.returncode is None:  # else its number may be another's by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        child.stdin.close()
        await child.wait()
        await listener  # ends with the child, whose group is dead
    words = told.decode(errors="replace")
    log.debug("child ended", extra={"about": about, "status": status, "told": words})
    if answer is None:
        raise ExportInterruptedError(_death(about, status, words))
    if "error" in answer:
        raise AdaptError.from_wire(*answer["error"])
    return dict(answer["answer"])


def answer(work: Callable[[dict[str, Any], Progress], dict[str, Any]]) -> int:
    """The child's main: do `work(request, say)` once. Exit status 0 with an answer on standard output, even if that is an error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to standard error

    def write(record: dict[str, Any]) -> None:
        answers.write(json.dumps(record) + "\n")
        answers.flush()

    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_leave_with_the_parent, name="leave-with-the-parent", daemon=True).start()
    try:
        write({"answer": work(request, lambda step, share: write({"step": step, "share": share}))})
    except AdaptError as error:
        write({"error": error.to_wire()})
    except ImportError as error:
        write({"error": ExportUnavailableError(f"what this needs cannot be loaded: {error}").to_wire()})
    except MemoryError:
        write({"error": ExportInterruptedError("this machine has too little memory for it").to_wire()})
    except Exception as error:  # the edge of foreign code: torchvision's, or that of the model
        logging.exception("failed")
        write({"error": ExportError(f"{type(error).__name__}: {str(error)[:500]}").to_wire()})
    return 0


def _leave_with_the_parent() -> None:
    while os.read(0, READ_BYTES):
        pass
    os._exit(1)


def _death(about: str, status: int, words: str) -> str:
    if status == -signal.SIGKILL:
        return f"{about}: its process was killed (SIGKILL), most likely because this machine has too little memory for it"
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    last = " / ".join(line.strip() for line in words.splitlines()[-3:])
    return f"{about}: its process ended {how} without an answer" + (f"; it last said: {last[-500:]}" if last else "")


async def _keep_end(stream: asyncio.StreamReader, told: bytearray) -> None:
    while data := await stream.read(READ_BYTES):
        told += data
        del told[:-TOLD_BYTES]


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length up to the limit (`readline` has a small one); what a dead child has left unfinished is no line."""
    buffer = bytearray()
    while data := await stream.read(READ_BYTES):
        buffer += data
        if b"\n" in data:
            *lines, rest = bytes(buffer).split(b"\n")
            buffer = bytearray(rest)
            for line in lines:
                yield line
        if len(buffer) > LINE_LIMIT_BYTES:
            raise ExportError(f"a child process answered with more than {LINE_LIMIT_BYTES} bytes")
