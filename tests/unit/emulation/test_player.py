"""The thread that plays a schedule."""

from __future__ import annotations

import threading

import pytest

from adapt.emulation.player import Player


def test_who_is_interrupted_before_the_thread_has_begun_can_close(monkeypatch):
    """Regression: Ctrl-C at that moment ended `adapt emulate` with a traceback, as what had not begun was waited for."""

    def interrupted(self) -> None:
        raise KeyboardInterrupt

    player = Player((), {}, None)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        player.start()
    player.close()
