"""What a kernel takes besides its inputs and its result: reordered copies, scratch pads, partial sums.

On the CPU, torch's profiler tells of each block that this thread gets and gives back; on CUDA, the allocator knows its own peak. What a library
takes elsewhere is not seen.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

import torch
from torch.autograd.profiler import profile

log = logging.getLogger(__name__)

Found = TypeVar("Found")

MEMORY_EVENT = "[memory]"  # as the profiler calls a block that was allocated or freed


def measured_workspace(work: Callable[[], None], device: torch.device) -> int | None:
    """Do this work, once, and tell the most bytes that were allocated meanwhile, on the CPU by this thread, beyond what it leaves behind. Earlier
    blocks that it frees would count too: hold them. Takes some milliseconds more.

    Returns: None: it is not known, as this build of torch cannot tell.
    Raises: as `work`.
    """
    asked = _attempt(lambda: _on_cuda(device) if device.type == "cuda" else _on_cpu())
    try:
        work()
    finally:
        taken_bytes = None if asked is None else _attempt(asked)
    return taken_bytes


def scratch_bytes(steps: Sequence[int]) -> int:
    """The peak above what stays, of blocks that were allocated (their bytes) and freed (negative) one after the other."""
    return max(accumulate(steps, initial=0)) - sum(steps)


def _on_cpu() -> Callable[[], int] | None:
    """Begins to watch; what is returned ends it and tells."""
    if not torch.autograd.kineto_available() or torch._C._autograd._profiler_enabled():  # it cannot look twice at a time
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at its first start; it would write to stderr at each
    profiler = profile(use_cpu=True, profile_memory=True).__enter__()

    def taken_bytes() -> int:
        profiler.__exit__(None, None, None)
        events = [event for event in profiler.kineto_results.events() if event.name() == MEMORY_EVENT]
        return scratch_bytes([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])

    return taken_bytes


def _on_cuda(device: torch.device) -> Callable[[], int]:
    """Likewise. The allocator counts when a block is asked for, not when a kernel runs: nothing has to be waited for."""
    torch.cuda.reset_peak_memory_stats(device)
    return lambda: max(torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device), 0)


def _attempt(step: Callable[[], Found]) -> Found | None:
    """Of foreign code: somebody else may be profiling, an allocator may keep no figures. A profile without them is still one."""
    try:
        return step()
    except Exception as error:
        log.debug("an operator's workspace was not measured", extra={"reason": f"{type(error).__name__}: {error}"})
        return None
