"""Run coopos where a container's filter refuses system calls: ``seccomp.py [ERRNO ...] [-- COMMAND ...]``.

A profile is an errno. EPERM: what Docker's filter answers, also to calls that are newer than it. ENOSYS: what gVisor answers, and
kernels that are older than the call. Under each, the doctor and the smoke part of the suite have to work by other calls; or
COMMAND, which takes the place of both.
"""

import errno
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
REFUSED = (
    "clone3 close_range copy_file_range epoll_pwait2 faccessat2 futex_waitv io_uring_enter io_uring_register io_uring_setup kcmp "
    "openat2 pidfd_getfd pidfd_open pidfd_send_signal preadv2 process_vm_readv process_vm_writev pwritev2 userfaultfd"
).split()
#: Docker answers ENOSYS here, too: glibc uses clone(2) then, and after EPERM it starts no thread.
#: https://github.com/moby/moby/blob/master/profiles/seccomp/default_linux.go
ALWAYS_ENOSYS = {"clone3"}
COMMANDS = [[sys.executable, "-m", "coopos", "doctor"], [sys.executable, "-m", "pytest", "-m", "smoke"]]


def refuse_all(name):
    """Have the calls fail in this process and in all that it starts, and see that they do."""
    from tests.helpers.support import SECCOMP

    places = {}
    exec(SECCOMP, places)
    answers = {call: errno.ENOSYS if call in ALWAYS_ENOSYS else getattr(errno, name) for call in REFUSED}
    for call, answer in answers.items():
        places["refuse"](call, answer)
    libc = places["libc"]
    for call, answer in answers.items():
        # Arguments that are wrong: a call that went through would give another errno.
        if libc.syscall(places["numbers"][call], -1, 0, -1, -1, -1, -1) != -1 or places["ctypes"].get_errno() != answer:
            sys.exit(f"{call} is not refused")


def main(arguments):
    commands = COMMANDS
    if "--" in arguments:
        at = arguments.index("--")
        arguments, commands = arguments[:at], [arguments[at + 1 :]]
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        sys.exit("the numbers of these system calls are known for Linux on x86_64 and aarch64")
    failed = 0
    for name in arguments or ["EPERM", "ENOSYS"]:
        for each in commands:
            print(f"--- {name}: {' '.join(each)}", flush=True)
            pid = os.fork()
            if pid == 0:
                refuse_all(name)
                os.execvp(each[0], each)
            failed += os.waitpid(pid, 0)[1] != 0
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main(sys.argv[1:]))
