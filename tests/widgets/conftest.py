"""A kernel with a front end, for tests of controls."""

import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook


@pytest.fixture(scope="module")
def kernel(request):
    """Return a function that runs code in a kernel, attended or not, and returns the texts of its settled outputs."""
    client = NotebookClient(new_notebook(), timeout=60)

    def run(source, attended=True):
        client.kc.allow_stdin = attended
        client.nb.cells = [new_code_cell(f"{source}\nimport asyncio\nawait asyncio.sleep(0.5)")]
        client.execute_cell(client.nb.cells[0], 0)
        return [output.data["text/plain"] for output in client.nb.cells[0].outputs if "data" in output]

    with client.setup_kernel():
        run(request.module.BEGIN)
        yield run
