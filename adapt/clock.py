"""The one way in which ADAPT knows time: seconds of a monotonic clock, as an argument."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]

monotonic: Clock = time.monotonic
