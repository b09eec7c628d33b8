"""Where a worker computes: which device, what its results depend on, and how much memory its runtime takes."""

from __future__ import annotations

import contextlib
import platform
import re
from pathlib import Path

import psutil
import torch

from adapt.errors import ConfigError
from adapt.protocol.messages import DeviceFacts

EXPECTED = "expected auto, cpu, or cuda:N with the number of a GPU"


def choose_device(setting: str) -> str:
    """The name of the torch device that `setting` means.

    Args:
        setting: "auto" (the first GPU if there is one, else the CPU), "cpu", "cuda" (the first GPU) or "cuda:N".

    Raises:
        ConfigError: no such device here, or not the name of one.
    """
    if setting == "cpu":
        return "cpu"
    if setting == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", setting)
    if match is None:
        raise ConfigError(f"device={setting[:32]!r}: {EXPECTED}")
    if not torch.cuda.is_available():
        why = "finds no GPU" if torch.backends.cuda.is_built() else "is built without CUDA"
        raise ConfigError(f"device={setting!r}: torch {torch.__version__} {why}; use cpu or auto")
    index, count = int(match[1] or 0), torch.cuda.device_count()
    if index >= count:
        there = "only cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ConfigError(f"device={setting!r}: this machine has {there}")
    return f"cuda:{index}"


def device_facts(device: str, *, threads: int) -> DeviceFacts:
    """What the bits of a result depend on besides the model and its input, as far as this worker decides it; the rest
    (layout, folding) is said by the program.

    The name of the processor is part of the numeric class: the libraries below torch choose kernels and block sizes by
    maker and cache, not by instruction set alone.

    Args:
        device: as `choose_device` returned it.
        threads: that torch uses within one operator.
    """
    name = _processor_name() if device == "cpu" else torch.cuda.get_device_name(device)
    kind = device.partition(":")[0]  # cuda:0 and cuda:1 of one model compute alike
    parts = [f"torch-{torch.__version__}", kind, name]
    if kind == "cuda":
        parts.append(f"cuda-{torch.version.cuda} cudnn-{torch.backends.cudnn.version()}")
    # What remains on the CPU, and host threads: a GPU's kernels do not depend on them.
    else:
        parts += [torch.backends.cpu.get_cpu_capability(), f"threads={threads}"]
    numeric_class = "/".join(parts)
    return DeviceFacts(device=device, device_name=name, threads=threads, numeric_class=numeric_class)


def limit_threads(threads: int) -> None:
    """Let torch use `threads` threads within one operator. To be called on the thread that computes: OpenMP and MKL
    keep the number per thread."""
    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:
        with contextlib.suppress(RuntimeError):  # its pool has started, in a process that is more than a worker
            torch.set_num_interop_threads(1)


def warm_up(device: str) -> None:
    """Have the libraries below torch set up what they set up once: their memory belongs to the floor of the runtime."""
    with torch.inference_mode():
        image = torch.zeros(1, 8, 16, 16, device=device)
        weight = torch.zeros(8, 8, 3, 3, device=device)
        features = torch.nn.functional.conv2d(image, weight, padding=1).relu_().flatten(1)
        torch.nn.functional.linear(features, torch.zeros(4, features.shape[1], device=device)).cpu()


def anonymous_bytes() -> int:
    """Memory of this process that no file backs (Linux: RssAnon); elsewhere all that is resident."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return int(psutil.Process().memory_info().rss)
    match = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else int(psutil.Process().memory_info().rss)


def _processor_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^(?:model name|Model|Hardware|cpu model)\s*:\s*(.+)$", text, re.MULTILINE)
    name = match[1] if match else platform.processor() or platform.machine()
    return " ".join(name.split())[:100]
