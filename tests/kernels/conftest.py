import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def hopper(request, tmp_path_factory):
    """The process that compiles the kernels for an H100, from the first test on if the one that waits for it will come: they
    take half a minute of a core, which the others leave free."""
    if not any("test_kernels_compile_for_hopper" in item.name for item in request.session.items):
        yield None
        return
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, Path(__file__).with_name("compile_for_hopper.py")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        yield job
        job.kill()
