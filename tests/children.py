"""The processes of a run, however they were started."""

import psutil


def running(pid, module):
    """Return the processes below the process `pid` that run a module, started cold or warm."""
    below = psutil.Process(pid).children(recursive=True)
    return [p for p in below if module in p.cmdline() or p.name() == module.rpartition(".")[2][:15]]
