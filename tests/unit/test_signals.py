"""Signals as calls, put back at the end."""

import signal
import threading

from ray_app.runs.signals import handle_signals


def test_a_signal_is_a_call_and_what_was_set_before_is_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    calls: list[int] = []
    with handle_signals({signal.SIGTERM: calls.append, signal.SIGINT: None}):
        signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a library may do
    assert calls == [signal.SIGTERM]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_beyond_the_main_thread_nothing_happens() -> None:
    before = signal.getsignal(signal.SIGTERM)
    inside: list[object] = []

    def work() -> None:
        with handle_signals({signal.SIGTERM: print}):
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]
