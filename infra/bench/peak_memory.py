"""Runs a command and prints the peak memory of its whole process tree, shared pages counted once.

Example: python infra/bench/peak_memory.py fixative demo
"""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

INTERVAL_S = 0.5


def tree_pss_bytes(root: psutil.Process) -> int:
    """Proportional set size of a process and all its descendants."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended between the listing and the reading
    return total


def main() -> int:
    """Returns the command's exit code."""
    command = subprocess.Popen(sys.argv[1:])
    root, peak, started = psutil.Process(command.pid), 0, time.monotonic()
    while command.poll() is None:
        try:
            peak = max(peak, tree_pss_bytes(root))
        except psutil.NoSuchProcess:
            break
        time.sleep(INTERVAL_S)
    print(f"peak memory of all processes: {peak / 1e9:.2f} GB; wall time {time.monotonic() - started:.0f} s")
    return command.wait()


if __name__ == "__main__":
    sys.exit(main())
