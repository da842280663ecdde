"""Memory of this process."""

import sys
from pathlib import Path


def peak_mebibytes() -> float:
    """Most memory that was resident in this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss counts what the process was forked from, too
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 2**10
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
