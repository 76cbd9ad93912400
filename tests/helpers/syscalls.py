"""Runs an action in a forked process, call by call to the kernel, and kills it on the way into one that writes.

By ptrace: the kernel stops the process at the entry of every system call, so that SIGKILL lands between two of
them, which is where a kill can leave a file system.
"""

import ctypes
import os
import platform
import signal
import struct
from collections.abc import Callable
from pathlib import Path

WRITING = {
    "x86_64": {
        1: "write",
        2: "open",
        18: "pwrite64",
        20: "writev",
        74: "fsync",
        75: "fdatasync",
        76: "truncate",
        77: "ftruncate",
        82: "rename",
        83: "mkdir",
        84: "rmdir",
        85: "creat",
        86: "link",
        87: "unlink",
        90: "chmod",
        91: "fchmod",
        257: "openat",
        258: "mkdirat",
        263: "unlinkat",
        264: "renameat",
        265: "linkat",
        268: "fchmodat",
        285: "fallocate",
        296: "pwritev",
        316: "renameat2",
    },
    "aarch64": {
        34: "mkdirat",
        35: "unlinkat",
        37: "linkat",
        38: "renameat",
        45: "truncate",
        46: "ftruncate",
        47: "fallocate",
        52: "fchmod",
        53: "fchmodat",
        56: "openat",
        64: "write",
        66: "writev",
        68: "pwrite64",
        70: "pwritev",
        82: "fsync",
        83: "fdatasync",
        276: "renameat2",
    },
}
"""Calls that change a file system or wait for it, by number; those that open count where they open to write."""
OPENS = {"open": 1, "openat": 2}
"""Which argument holds the flags."""
TRACEME, SYSCALL, SETOPTIONS, GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
TRACESYSGOOD, EXITKILL = 0x1, 0x100000
ENTRY = 1
INFO = struct.Struct("=B3xIQQQ6Q")
"""op, architecture, instruction and stack pointer, number, arguments: the same on every architecture."""
REFUSED = 77


class CannotTrace(Exception):
    """No process can be traced on this machine; the message says why."""


def writing_calls(action: Callable[[], None], kill_at: int | None = None) -> list[str]:
    """The names of the writing calls that `action` enters, in order; killed in the entry of `kill_at` (from 0).

    `action` runs in a fork and has one thread, which is asserted: a second one would not be stopped. Without
    `kill_at` it must end well.
    """
    names = WRITING.get(platform.machine())
    if platform.system() != "Linux" or names is None:
        raise CannotTrace(f"the calls of {platform.system()} on {platform.machine()} are not known here")
    pid = os.fork()
    if not pid:
        _be_traced(action)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        raise CannotTrace("ptrace is not permitted")
    _ptrace(SETOPTIONS, pid, TRACESYSGOOD | EXITKILL)
    entered: list[str] = []
    info = ctypes.create_string_buffer(128)
    forward = 0
    while True:
        _ptrace(SYSCALL, pid, forward)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            break
        forward = 0
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            forward = os.WSTOPSIG(status)
            continue
        if _ptrace(GET_SYSCALL_INFO, pid, ctypes.addressof(info), len(info)) < 0:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise CannotTrace("this kernel reports nothing of a call (Linux 5.3 does)")
        op, _, _, _, number, *arguments = INFO.unpack_from(info)
        name = names.get(number)
        if op != ENTRY or name is None:
            continue
        if name in OPENS and not arguments[OPENS[name]] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            continue
        assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1, "a thread that is not traced could write on"
        if len(entered) == kill_at:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            assert os.WTERMSIG(status) == signal.SIGKILL
            return [*entered, name]
        entered.append(name)
    assert kill_at is None, f"only {len(entered)} writing calls, none to be killed at {kill_at}"
    assert os.waitstatus_to_exitcode(status) == 0, "the action failed"
    return entered


def _be_traced(action: Callable[[], None]) -> None:
    code = 1
    try:
        if _ptrace(TRACEME, 0) < 0:
            os._exit(REFUSED)
        os.kill(os.getpid(), signal.SIGSTOP)
        action()
        code = 0
    finally:
        os._exit(code)


def _ptrace(request: int, pid: int, data: int = 0, address: int = 0) -> int:
    """ptrace(2); for GET_SYSCALL_INFO `address` is the size of the buffer, as the kernel wants it."""
    return LIBC.ptrace(request, pid, address, data)


LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
LIBC.ptrace.restype = ctypes.c_long
