"""A real JupyterLab in a real browser, as far as the tests of notebooks need it."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
OPEN = """async path => {
  const { shell, commands } = window.jupyterapp;
  for (const widget of [...shell.widgets('main')]) widget.dispose();
  const panel = await commands.execute('docmanager:open', { path });
  shell.activateById(panel.id);
  await panel.revealed;
  await panel.sessionContext.ready;
}"""


def browser():
    """Return the path of Chromium, None where it is not installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


KERNEL = """
import os, sys
from shrinkkit.core import processes, warm
kernel = warm.start(sys.argv[1], processes.command("ipykernel_launcher", "-f", sys.argv[2]), env=os.environ)
sys.exit(kernel.wait())
"""
"""Code that runs a kernel which is forked from the process at an address."""


@contextlib.contextmanager
def server(folder, warm_address):
    """Start JupyterLab in `folder` and give its address; it keeps nothing of the user's and nothing is kept of it.

    Its kernels are forked from the process at `warm_address`, but for those called `cold`, which start as anywhere.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = folder / ".jupyter"
    where = {f"JUPYTER_{name}_DIR": str(own / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    where |= {
        "JUPYTER_PATH": str(own),
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
    }
    warm, cold = ["-P", "-c", KERNEL, warm_address], ["-m", "ipykernel_launcher", "-f"]
    for name, options in {"python3": warm, "cold": cold}.items():
        kernel = own / "kernels" / name / "kernel.json"
        kernel.parent.mkdir(parents=True)
        argv = [sys.executable, *options, "{connection_file}"]
        kernel.write_text(json.dumps({"argv": argv, "display_name": name, "language": "python"}))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--port={port}", "--ServerApp.port_retries=0"]
    command += ["--IdentityProvider.token=", "--ServerApp.password=", "--LabApp.expose_app_in_browser=True"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url="]
    with (folder / "lab.log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--ServerApp.root_dir={folder}"], stdout=log, stderr=log, cwd=folder, env=os.environ | where
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _await(address, process, folder / "lab.log")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


def _await(address, process, log):
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{address}/api", timeout=5).close()
            return
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


class Lab:
    """JupyterLab in a page of its own, in which one notebook after the other is opened: loading it takes seconds."""

    def __init__(self, opened, address):
        """Open JupyterLab at `address` in the browser `opened`, which remembers nothing of earlier pages."""
        # So high that JupyterLab, which takes cells out of sight away, keeps all of them.
        self.page = opened.new_page(viewport={"width": 1280, "height": 9000})
        self.address, self.outside, self.problems = address, [], []
        self.page.on("request", self._look_at)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(f"{address}/lab?reset")
        self.page.wait_for_function("window.jupyterapp !== undefined", timeout=60_000)
        self.page.evaluate("window.jupyterapp.restored")

    def _look_at(self, request):
        if not request.url.startswith(("data:", "blob:", self.address, self.address.replace("http", "ws"))):
            self.outside.append(request.url)

    def open(self, path):
        """Open the notebook at `path`, relative to the server's folder, with a new kernel and nothing else open."""
        self.outside, self.problems = [], []
        self.page.evaluate(OPEN, path)

    def run_all(self, timeout_s=240):
        """Run every cell and return when the last one has ended."""
        self.page.set_default_timeout(timeout_s * 1000)
        self.command("notebook:run-all-cells")

    def command(self, name):
        """Do what a menu entry does, and wait until it is done."""
        self.page.evaluate(f"window.jupyterapp.commands.execute('{name}')")

    def save(self):
        """Save the notebook."""
        self.command("docmanager:save")

    def close(self):
        """Shut the kernel down."""
        self.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")


def outputs(path):
    """Return every output that a saved notebook holds."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
