"""A process that has imported what every rung imports of other libraries, and forks for each one: ``python nursery.py``.

It reads a line of JSON a run (its folder, the arguments of pytest, its environment and the files for its output), and answers
with a line, the exit code. Nothing of the project is imported here: a fork takes that from its own folder.
"""

import json
import os
import resource
import sys

import hypothesis  # noqa: F401
import ml_dtypes  # noqa: F401
import pytest
import torch  # noqa: F401
import triton.language  # noqa: F401

SECONDS = 300  # of one core, for a run; an error may never end


def run(folder, arguments, environment, stdout, stderr):
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    for descriptor, path in enumerate((os.devnull, stdout, stderr)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = folder
    code = pytest.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


for line in sys.stdin:
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    else:
        code = 1
        try:
            code = run(*json.loads(line))
        finally:
            os._exit(code)  # what the parent has left to do isn't the fork's
