"""Twenty programs, one after the other, in a program that has so many MB of memory."""

import os
import sys
import time

if sys.argv[1] == "gevent":
    from gevent import subprocess
else:
    from coopos import subprocess

memory = bytearray(int(sys.argv[2]) << 20)
memory[::4096] = b"x" * len(memory[::4096])  # all of it is there
forks = []
os.register_at_fork(before=lambda: forks.append(1))

subprocess.Popen(["true"]).wait()
times = []
for _ in range(19):
    start = time.perf_counter()
    subprocess.Popen(["true"]).wait()
    times.append(time.perf_counter() - start)
print("forks of the whole program:", len(forks))
print(f"one program, from Popen to the end of wait: {sorted(times)[9] * 1e3:.1f} ms")
