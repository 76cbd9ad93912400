"""Signals of the operating system as calls, for the commands that end in order."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

Handlers = Mapping[signal.Signals, Callable[[int], object] | None]


@contextmanager
def handle_signals(handlers: Handlers) -> Iterator[None]:
    """Call a handler with the number of its signal; put back what was set before at the end.

    None leaves a signal as it is, but puts it back too, for libraries that set handlers and leave them. Python lets
    the main thread alone do this: elsewhere nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        if handler is not None:
            signal.signal(number, _with_number(handler))
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _with_number(call: Callable[[int], object]) -> Callable[[int, FrameType | None], None]:
    def handler(number: int, _: FrameType | None) -> None:
        call(number)

    return handler
