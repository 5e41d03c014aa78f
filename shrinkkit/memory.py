"""Peak memory of model files, each loaded and called in a process of its own.

`python -m shrinkkit.memory FOLDER` imports the runtime once, then forks such a process for each file. For the size of a
file on disk see `artifacts`.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from shrinkkit.errors import ShrinkkitError, brief
from shrinkkit.records import Memory
from shrinkkit.usermodel import Example

TIMEOUT_S = 120
"""For one file."""
CALLS = 6
"""Of each model: TorchScript compiles during its first ones, and that takes memory too."""
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(
    paths: Mapping[str, Path], *, runtime: str, inputs: Example, threads: int, device: str = "cpu"
) -> dict[str, Memory | str]:
    """Return the peak memory of each model file, or in a sentence why there is none.

    On the CPU it is the system's count of resident pages above what the process held before it opened the file:
    weights, also those mapped from the file, activations, what the runtime packs anew, and thread stacks. Freed memory
    goes back to the system at once, which a deployment's allocator may put off. On a GPU it is what CUDA's allocator
    handed out.

    Args:
        paths: Model files by name.
        runtime: `torch` or `onnxruntime`, for all of them.
        inputs: Positional inputs of one call, batch first.
        threads: Intra-op threads.
        device: `cpu` or `cuda`.

    Source: proc(5), `clear_refs` and `VmHWM`.
    """
    if not STATUS.is_file():
        return dict.fromkeys(paths, "it is counted by Linux's /proc, which this system does not have")
    if not paths:
        return {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({str(i): x.cpu().contiguous() for i, x in enumerate(inputs)}, folder / "inputs.safetensors")
        files = {name: str(path.resolve()) for name, path in paths.items()}
        request = {"files": files, "runtime": runtime, "threads": threads, "device": device}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        # Large blocks must go back to the system when they are freed, or the next one is not seen.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "shrinkkit.memory", name]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not (folder / "answer.json").is_file():
            cause = (ended.stderr.strip().splitlines() or [f"status {ended.returncode}"])[-1]
            return dict.fromkeys(paths, f"the process that counts it ended early: {cause}")
        answers: dict[str, Any] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        return {name: answer if isinstance(answer, str) else Memory(**answer) for name, answer in answers.items()}


def _serve(folder: Path) -> None:
    """Write what each file of the request takes, every one from a child of this process."""
    import torch

    from shrinkkit import artifacts

    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    inputs = load_file(folder / "inputs.safetensors")
    example = tuple(inputs[str(i)] for i in range(len(inputs)))
    # A pool of threads does not survive a fork, so none may be there yet.
    torch.set_num_threads(1)
    # What loading imports is the runtime's memory and not the file's. An error is told in the file's own answer.
    for path in request["files"].values():
        with contextlib.suppress(ShrinkkitError, RuntimeError, ValueError):
            artifacts.load(Path(path), runtime=request["runtime"], threads=1)
            break
    ctypes.CDLL(None).malloc_trim(0)
    answers = {name: _in_child(path, example, request) for name, path in request["files"].items()}
    (folder / "answer.json").write_text(json.dumps(answers), encoding="utf-8")


def _in_child(path: str, example: Example, request: Mapping[str, Any]) -> Any:
    """Return what a forked child counted for one file, or why it could not, in a sentence."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(TIMEOUT_S)
        answer: Any
        try:
            answer = _count(Path(path), example, request)
        except (ShrinkkitError, RuntimeError, ValueError, OSError, MemoryError) as error:
            answer = brief(error)
        os.write(writing, json.dumps(answer).encode())
        # Not `sys.exit`: what the parent set up is the parent's to tear down.
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if said:
        return json.loads(said)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        return f"loading and calling it took longer than {TIMEOUT_S} s"
    return f"its process was ended by signal {os.WTERMSIG(status)}, as for want of memory"


def _count(path: Path, example: Example, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Memory` for one file, counted in this process."""
    import torch

    from shrinkkit import artifacts

    device = request["device"]
    torch.set_num_threads(request["threads"])
    before = _status("VmRSS")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        _reset_peak()
    loaded = artifacts.load(path, runtime=request["runtime"], device=device, threads=request["threads"])
    call = loaded.prepare(example)
    load = torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM") - before
    with torch.inference_mode():
        for _ in range(CALLS):
            call()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM") - before
    method = "allocator" if device == "cuda" else "resident"
    return {"runtime_bytes": before, "load_bytes": load, "peak_bytes": peak, "method": method}


def _reset_peak() -> None:
    # Where that is forbidden: a forked process begins with a peak of its own, which is what it holds.
    with contextlib.suppress(OSError):
        RESET.write_text("5", encoding="ascii")


def _status(field: str) -> int:
    """Return a field of the kernel's description of this process, in bytes."""
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
