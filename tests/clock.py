"""Time that passes only where a test lets it."""

import itertools
from collections.abc import Callable


class Clock:
    """Time that passes only where a test lets it, in place of the module `time`."""

    def __init__(self):
        self.ns = 0

    def perf_counter(self):
        return self.ns / 1e9

    def perf_counter_ns(self):
        return self.ns

    def models(self, ms: Callable[[], float], *, copy_s: float = 0.0, log: list | None = None):
        """Return a factory of copies that each take `ms()` a call, and log (copy, number of the call)."""
        copies = itertools.count()

        def make():
            self.ns += round(copy_s * 1e9)
            copy, numbers = next(copies), itertools.count()

            def call():
                self.ns += round(ms() * 1e6)
                if log is not None:
                    log.append((copy, next(numbers)))

            return call

        return make
