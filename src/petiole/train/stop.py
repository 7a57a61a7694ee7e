"""Ctrl-C as a request that is answered between two steps."""

import signal
import threading
from types import FrameType, TracebackType


class Stop:
    """While it is entered, the first Ctrl-C only sets `is_asked`; a second one interrupts at once, as always.

    Does nothing outside the main thread, which alone may handle signals, or where somebody else handles Ctrl-C.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self.is_ours = False

    def __enter__(self) -> "Stop":
        is_free = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if is_free and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._ask)
            self.is_ours = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
