"""Memory that a call takes beyond its output: the high-water mark of the resident set, by the kernel's own count.

It sees every allocation, C++ scratch too. A process of its own keeps what other tests have allocated out of it.
"""

import subprocess
import sys

_CODE = """
import torch, fastadapt
{setup}
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
def extra(*arguments):
    x, call = prepare(*arguments)
    call(x[:8])  # threads and code pages
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    y = call(x)
    return status("VmHWM") - before - y.nbytes
torch.set_num_threads(2)
extra({small})
print(extra({arguments}))
"""


def extra_bytes(setup: str, small: str, arguments: str) -> int:
    """``setup`` defines ``prepare``, which returns x and a function of it; ``small`` and ``arguments`` are its arguments."""
    code = _CODE.format(setup=setup, small=small, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
