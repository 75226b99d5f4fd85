"""Signals that ask a command to stop."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Yield an event that the first SIGINT or SIGTERM sets; the second ends the process at once."""
    stop = threading.Event()
    incoming, outgoing = os.pipe()
    os.set_blocking(outgoing, False)
    # A handler runs inside of whatever the main thread does. Setting the event there would wait for ever when that
    # is `stop.wait`, which holds the event's lock. So a thread sets it, and the handler does nothing.
    before = {number: signal.signal(number, lambda *_: None) for number in STOPPING}
    fd_before = signal.set_wakeup_fd(outgoing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(incoming, stop), name="signals", daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(fd_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(outgoing)
        watcher.join()
        os.close(incoming)


def _watch(incoming: int, stop: threading.Event) -> None:
    while numbers := os.read(incoming, 1):
        # Other signals that have a handler arrive here, too.
        if numbers[0] not in STOPPING:
            continue
        if stop.is_set():
            os._exit(128 + numbers[0])
        stop.set()
