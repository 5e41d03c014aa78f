"""Peak memory of model files, each loaded and called in a separate process.

`python -m shrinkkit.measure.peak_memory FOLDER` imports the runtime once, then forks a process for each file. In a run
it is itself forked, from a process that has imported what this module needs, as `warm.VARIABLE` says.
"""

import contextlib
import json
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from shrinkkit.core import processes, warm
from shrinkkit.core.measurement import Memory
from shrinkkit.errors import brief
from shrinkkit.tasks import copies
from shrinkkit.tasks.modules import Example

TIMEOUT_S = 120
"""For one file."""
CALLS = 6
"""Of each model: TorchScript compiles during its first ones, and that takes memory too."""
STATUS, SMAPS, RESET = (Path("/proc/self", name) for name in ("status", "smaps", "clear_refs"))


def measure(
    paths: Mapping[str, Path], *, runtime: str, inputs: Example, threads: int, device: str = "cpu"
) -> dict[str, Memory | str]:
    """Return the peak memory of each model file, or the reason why there is none.

    On the CPU it is the number of resident bytes above those before the file was opened: weights, packed weights,
    activations, scratch space and thread stacks. On a GPU it is what CUDA's allocator handed out. Inputs do not count.

    The runtime's code, which is paged in on first use, is in `runtime_bytes`. ONNX Runtime holds the file and its
    weights at once while it loads, and its arena reserves more than the activations need; a deployment pays for both.
    Freed blocks of 128 KiB or more are returned to the system at once, which a deployment's allocator may delay. With
    transparent huge pages for all memory, a block counts in whole pages of 2 MiB.

    Source: proc(5), `clear_refs`, `VmHWM` and `smaps`.
    """
    if not all(path.exists() for path in (STATUS, SMAPS, RESET)):
        return dict.fromkeys(paths, "it is counted by Linux's /proc, which this system does not have")
    if not paths:
        return {}
    # A folder that the next run removes if this process is killed.
    with processes.short_folder() as folder:
        # Copies, because inputs that share memory cannot be stored.
        save_file({str(i): x.cpu().contiguous().clone() for i, x in enumerate(inputs)}, folder / "inputs.safetensors")
        files = {name: str(path.resolve()) for name, path in paths.items()}
        request = {"files": files, "runtime": runtime, "threads": threads, "device": device}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = processes.command("shrinkkit.measure.peak_memory", str(folder))
        address = os.environ.get(warm.VARIABLE)
        start = partial(warm.start, address) if address else None
        ended = processes.run(command, limit_s=math.inf, variables={"OMP_NUM_THREADS": str(threads)}, start=start)
        if not (folder / "answer.json").is_file():
            cause = (ended.errors.strip().splitlines() or [f"status {ended.status}"])[-1]
            return dict.fromkeys(paths, f"the process that counts it ended early: {cause}")
        answers: dict[str, Any] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        return {name: answer if isinstance(answer, str) else Memory(**answer) for name, answer in answers.items()}


# Freed large blocks must be returned to the system, or the next one does not show.
@copies.freeing_large_blocks(128 * 1024)
def _serve(folder: Path) -> None:
    """Write the peak memory of each file of the request, measured in a child of this process."""
    import torch

    from shrinkkit.runtimes import files, registry

    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    # A thread pool does not survive a fork, so none may come to be, as it would when large inputs are copied.
    torch.set_num_threads(1)
    inputs = load_file(folder / "inputs.safetensors")
    # Copies, because a fork does not inherit resident pages of a mapped file: a child would count them on first use.
    example = tuple(inputs[str(i)].clone() for i in range(len(inputs)))
    paths = {name: Path(path) for name, path in request["files"].items()}
    # What loading a file imports and initializes is memory of the runtime, not of the file.
    registry.backend(request["runtime"])
    for suffix in {path.suffix for path in paths.values()}:
        alike = {path for path in paths.values() if path.suffix == suffix and path.is_file()}
        for path in sorted(alike, key=lambda path: path.stat().st_size):
            load = partial(files.load, path, runtime=request["runtime"], threads=1)
            # In a child, because a file that cannot be loaded may end the process.
            if not isinstance(_in_child(load), str):
                load()
                break
    # Freed here, or a child would free it and seem to need less.
    copies.trim_heap()
    answers = {name: _in_child(partial(_count, path, example, request)) for name, path in paths.items()}
    (folder / "answer.json").write_text(json.dumps(answers), encoding="utf-8")


def _in_child(work: Callable[[], Any]) -> Any:
    """Return the result of `work` in a fork of this process, or the reason why there is none."""
    reading, writing = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            processes.die_with(parent)
            os.close(reading)
            signal.alarm(TIMEOUT_S)
            try:
                answer = work()
            except Exception as error:  # runtimes raise various error types
                answer = brief(error)
            # What is not JSON, such as a loaded file, becomes None.
            os.write(writing, json.dumps(answer, default=lambda _: None).encode())
        finally:
            # Not `sys.exit`, which would run the parent's clean-up.
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        result = pipe.read()
    _, status = os.waitpid(child, 0)
    if result:
        return json.loads(result)
    if not os.WIFSIGNALED(status):
        return "its process ended without an answer"
    ended = signal.Signals(os.WTERMSIG(status))
    if ended is signal.SIGALRM:
        return f"loading and calling it took longer than {TIMEOUT_S} s"
    return f"its process was ended by {ended.name}" + (", as for want of memory" if ended is signal.SIGKILL else "")


def _count(path: Path, example: Example, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Memory` for one file, counted in this process."""
    import torch

    from shrinkkit.runtimes import files

    device, threads = request["device"], request["threads"]
    torch.set_num_threads(threads)
    placed = tuple(x.to(device) for x in example)
    code, before = _code(), _status("VmRSS")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
    else:
        # If that is forbidden: the peak of a forked process starts at what it holds.
        with contextlib.suppress(OSError):
            RESET.write_text("5", encoding="ascii")

    def peak() -> int:
        """Return the most bytes that CUDA's allocator handed out, or that were resident, code apart, above `before`."""
        if device == "cuda":
            return torch.cuda.max_memory_allocated() - allocated
        return _status("VmHWM") - before - (_code() - code)

    loaded = files.load(path, runtime=request["runtime"], device=device, threads=threads)
    call = loaded.bind(placed)
    load_bytes = peak()
    with torch.inference_mode():
        for _ in range(CALLS):
            call()
    runtime_bytes = before + _code() - code - sum(x.nbytes for x in example)
    sizes = {"runtime_bytes": runtime_bytes, "load_bytes": load_bytes, "peak_bytes": max(load_bytes, peak())}
    return {**sizes, "method": "allocator" if device == "cuda" else "resident"}


def _status(field: str) -> int:
    """Return a field of the kernel's description of this process, in bytes."""
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _code() -> int:
    """Return the resident bytes of the program and its libraries that are unchanged from disk."""
    kilobytes: Counter[str] = Counter()
    programs, name = set(), ""
    with SMAPS.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            first, second, *_ = line.split(maxsplit=5)
            if first == "Rss:":
                kilobytes[name] += int(second)
            elif first == "Anonymous:":
                kilobytes[name] -= int(second)
            elif not first.endswith(":"):
                name = line.split(maxsplit=5)[5].strip() if line.count("/") else ""
                if "x" in second and name:
                    programs.add(name)
    return 1024 * sum(kilobytes[name] for name in programs)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
