"""Processors as tests need them: whether this one has VNNI, and processes that believe it has none.

Libraries choose kernels by CPUID. torch's take orders from variables. For ONNX Runtime and OpenVINO each `cpuid`
instruction becomes an invalid one as the library is loaded, and a signal handler answers without VNNI and AVX-512. That
needs no right and no interception by the kernel, and the kernels run at full speed.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

VARIABLES = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}
"""Make the libraries of torch use the kernels that they have for processors without VNNI."""
_CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
_LIBRARIES = {
    "onnxruntime": ["capi/onnxruntime_pybind11_state*.so"],
    "openvino": ["libs/libopenvino_intel_cpu_plugin.so", "libs/libopenvino.so.*"],
}
_BEFORE = 256
"""Bytes before a `cpuid` from which it is decoded; a wrong start is made good within a few instructions."""
_SOURCE = r"""
#define _GNU_SOURCE
#include <cpuid.h>
#include <link.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
static void answer(int number, siginfo_t *info, void *context) {
  greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
  unsigned char *at = (unsigned char *)r[REG_RIP];
  if (at[0] != 0x0f || at[1] != 0x0b) { signal(SIGILL, SIG_DFL); return; }
  unsigned a, b, c, d, leaf = r[REG_RAX], sub = r[REG_RCX];
  __cpuid_count(leaf, sub, a, b, c, d);
  if (leaf == 7 && sub == 0) { b &= ~0xDC230000u; c &= ~0x5842u; d &= ~0x03C0010Cu; }
  if (leaf == 7 && sub == 1) { a &= ~0x00A00030u; d &= ~0x00080530u; }
  r[REG_RAX] = a; r[REG_RBX] = b; r[REG_RCX] = c; r[REG_RDX] = d; r[REG_RIP] += 2;
}
static void install(void) {
  struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGILL, &action, 0);
}
unsigned la_version(unsigned version) { return LAV_CURRENT; }
unsigned la_objopen(struct link_map *map, Lmid_t id, uintptr_t *cookie) {
  FILE *places = fopen(getenv("CPUID_PLACES"), "r");
  char name[256];
  unsigned long at;
  while (places && fscanf(places, "%255s %lx", name, &at) == 2) {
    if (strcmp(name, basename(map->l_name))) continue;
    install(); /* pytest has a handler of its own */
    unsigned char *code = (unsigned char *)map->l_addr + at, *page = (unsigned char *)((uintptr_t)code & ~4095ul);
    if (code[0] != 0x0f || code[1] != 0xa2 || mprotect(page, 8192, PROT_READ | PROT_WRITE | PROT_EXEC)) _Exit(77);
    code[1] = 0x0b;
    mprotect(page, 8192, PROT_READ | PROT_EXEC);
  }
  if (places) fclose(places);
  return 0;
}
"""


def has_vnni(runtime):
    """Return whether a runtime finds VNNI in this process, or a processor of another architecture."""
    hidden = "CPUID_PLACES" if runtime in _LIBRARIES else "ONEDNN_MAX_CPU_ISA"
    return ("vnni" in _CPU or "avx2" not in _CPU) and hidden not in os.environ


@functools.cache
def _places(library):
    """Return a line for each `cpuid` instruction of a library: its file name and address.

    Other instructions hold the same two bytes, so objdump decodes what precedes each pair. All of a library would take
    it ten seconds.
    """
    headers = _objdump("-h", library)
    size, address, offset = (int(n, 16) for n in re.search(r" \.text +(\w+) +(\w+) +\w+ +(\w+)", headers).groups())
    code = library.read_bytes()[offset : offset + size]
    pairs = [match.start() for match in re.finditer(rb"\x0f\xa2", code)]
    # Padded with `nop`, so that an instruction cut off at the end does not reach into the next piece.
    pieces = [
        code[max(0, at - _BEFORE) : at + 2].rjust(_BEFORE + 2, b"\x90").ljust(_BEFORE + 16, b"\x90") for at in pairs
    ]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(pieces))
        file.flush()
        lines = _objdump("-D", "-b", "binary", "-m", "i386:x86-64", "--no-show-raw-insn", file.name).splitlines()
    decoded = [divmod(int(line.partition(":")[0], 16), _BEFORE + 16) for line in lines if line.endswith("cpuid")]
    return [f"{library.name} {address + pairs[piece]:x}" for piece, at in decoded if at == _BEFORE]


def _objdump(*arguments):
    return subprocess.run(["objdump", *arguments], capture_output=True, text=True, check=True).stdout


def without_vnni(folder):
    """Return an environment in which all runtimes take this for a processor without VNNI, or skip the test.

    Args:
        folder: For the library that answers `cpuid`; kept as long as the environment is used.
    """
    if "CPUID_PLACES" in os.environ:
        return dict(os.environ)
    if sys.platform != "linux" or "avx2" not in _CPU or not shutil.which("cc") or not shutil.which("objdump"):
        pytest.skip("needs Linux on x86, a C compiler and objdump")
    source, library, places = folder / "cpuid.c", folder / "cpuid.so", folder / "places"
    source.write_text(_SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    folders = {name: Path(find_spec(name).origin).parent for name in _LIBRARIES}
    libraries = [path for name, patterns in _LIBRARIES.items() for p in patterns for path in folders[name].glob(p)]
    places.write_text("\n".join(line for path in libraries for line in _places(path)) + "\n")
    return {**os.environ, **VARIABLES, "LD_AUDIT": str(library), "CPUID_PLACES": str(places)}


if __name__ == "__main__":
    # python tests/processors.py python -m pytest tests
    with tempfile.TemporaryDirectory() as name:
        sys.exit(subprocess.run(sys.argv[1:], env=without_vnni(Path(name)), check=False).returncode)
