"""Runs one program and its tests in this process, which first gives up all that they have no need of.

Started by ``tasks.sandbox``, never imported by it: reads its task from standard input as JSON, and writes the task's
secret to the file descriptor in its argument when every test has passed. Imports the standard library alone.
"""

import contextlib
import json
import os
import sys
from typing import Any

# By prefix, of https://docs.python.org/3/library/audit_events.html
_REFUSED_EVENTS = (
    *("socket.", "subprocess.", "ctypes.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "pty."),
    *("os.startfile", "os.kill", "signal.pthread_kill", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link"),
    *("os.symlink", "os.truncate", "os.ch", "os.lch", "os.utime", "os.setxattr", "os.removexattr", "os.putenv"),
    *("shutil.", "tempfile.", "resource.", "gc.get_", "sys._current_", "sys.settrace", "sys.setprofile", "mmap."),
)
_REFUSED_IMPORTS = {"ctypes", "_ctypes", "_posixsubprocess", "_posixshmem", "_multiprocessing"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Run the task on standard input."""
    handed = int(sys.argv[1])
    task = json.load(sys.stdin)
    write, leave, run = os.write, os._exit, exec  # before the program could put others in their place
    limit(task["seconds"], task["memory_mib"])
    held = "kernel" if filter_system_calls() else "interpreter"
    for name in _REFUSED_IMPORTS & sys.modules.keys():
        del sys.modules[name]  # what is loaded already would be imported again without an audit event
    sys.addaudithook(refuse)
    namespace: dict[str, Any] = {"__name__": "answer"}
    try:
        for statements in (task["program"], *task["tests"]):
            run(statements, namespace)
    except BaseException:  # SystemExit and KeyboardInterrupt among them: none of these passes
        leave(1)
    write(handed, f"{task['secret']} {held}".encode())
    leave(0)


def limit(seconds: float, memory_mib: int) -> None:
    """Lower this process's limits for good: CPU time, memory, and no file, core or further process."""
    import resource

    memory = memory_mib * 2**20
    for name, value in (
        ("RLIMIT_CPU", int(seconds) + 1),
        ("RLIMIT_AS", memory),
        ("RLIMIT_DATA", memory),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NOFILE", 32),
        ("RLIMIT_NPROC", 0),  # does not bind root, whom the filter below does
    ):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # macOS knows some of these by name alone
            resource.setrlimit(getattr(resource, name), (value, value))


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: stop Python code that reaches outside. It cannot be taken away again."""
    refused = event.startswith(_REFUSED_EVENTS)
    if event == "open":
        path, _, flags = arguments
        refused = bool(flags & _WRITING) or os.fsdecode(path if isinstance(path, str | bytes) else "").startswith(
            "/proc"
        )
    elif event == "import":
        refused = arguments[0] in _REFUSED_IMPORTS
    if refused:
        raise PermissionError(f"{event} is refused to generated code")


# Linux system calls by their numbers on x86-64 and arm64 (- where there is no such call): sockets, processes and
# signals, every way to change a file system, limits, and the ways around a filter.
_CALLS = """
socket 41 198, connect 42 203, bind 49 200, socketpair 53 199, fork 57 -, vfork 58 -, execve 59 221, execveat 322 281,
ptrace 101 117, kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138, pidfd_open 434 434,
pidfd_send_signal 424 424, pidfd_getfd 438 438, process_vm_readv 310 270, process_vm_writev 311 271,
setpriority 141 140, creat 85 -, truncate 76 45, ftruncate 77 46, unlink 87 -, unlinkat 263 35, rmdir 84 -,
mkdir 83 -, mkdirat 258 34, mknod 133 -, mknodat 259 33, rename 82 -, renameat 264 38, renameat2 316 276, link 86 -,
linkat 265 37, symlink 88 -, symlinkat 266 36, chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452,
chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88,
setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16,
fallocate 285 47, openat2 437 437, open_by_handle_at 304 265, mount 165 40, umount2 166 39, chroot 161 51,
pivot_root 155 41, unshare 272 97, setns 308 268, bpf 321 280, io_uring_setup 425 425, memfd_create 319 279,
userfaultfd 323 282, perf_event_open 298 241, keyctl 250 219, add_key 248 217, request_key 249 218, shmget 29 194,
msgget 68 186, semget 64 190, mq_open 240 180, setrlimit 160 164, prlimit64 302 261, setuid 105 146, setgid 106 144,
setresuid 117 147, init_module 175 105, kexec_load 246 104, reboot 169 142, settimeofday 164 170,
clock_settime 227 112, sethostname 170 161
"""
# machine: place in the table above; the kernel's mark of the architecture; open, openat, clone and clone3
_MACHINES = {"x86_64": (0, 0xC000003E, 2, 257, 56, 435), "aarch64": (1, 0xC00000B7, None, 56, 220, 435)}

_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38
_CLONE_THREAD, _X32 = 0x10000, 0x40000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; arguments take 8 bytes each
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF, on 32-bit words


def filter_program(machine: str) -> list[tuple[int, int, int, int]]:
    """Return the filter as classic BPF: (code, instructions to skip if true, if false, constant) each."""
    place, architecture, opening, opening_at, clone, clone3 = _MACHINES[machine]
    numbers = [call.split()[1 + place] for call in _CALLS.split(",")]
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _EPERM)]
    program += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _EPERM)]
    for number in numbers:
        if number != "-":
            program += [(_EQUAL, 0, 1, int(number)), (_RETURN, 0, 0, _EPERM)]
    # Its flags lie in memory, out of a filter's sight; the C library falls back on clone.
    program += [(_EQUAL, 0, 1, clone3), (_RETURN, 0, 0, _ENOSYS)]
    for call, argument in ((opening, 1), (opening_at, 2)):
        if call is not None:
            flags = (_LOAD, 0, 0, _ARGUMENTS + 8 * argument)
            program += [(_EQUAL, 0, 4, call), flags, (_ANY_BIT, 0, 1, _WRITING)]
            program += [(_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]
    program += [(_EQUAL, 0, 3, clone), (_LOAD, 0, 0, _ARGUMENTS), (_ANY_BIT, 1, 0, _CLONE_THREAD)]
    return [*program, (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]


def filter_system_calls() -> bool:
    """Put the filter on this process, for good; say whether the kernel took it."""
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in _MACHINES:
        return False
    import ctypes

    class Instruction(ctypes.Structure):
        _fields_ = [("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint)]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction))]

    lines = filter_program(machine)
    program = Program(len(lines), (Instruction * len(lines))(*(Instruction(*line) for line in lines)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    die_with_parent, no_new_privileges, set_seccomp, sigkill = 1, 38, 22, 9
    prctl(die_with_parent, sigkill, 0, 0, 0)
    return not prctl(no_new_privileges, 1, 0, 0, 0) and not prctl(set_seccomp, 2, ctypes.byref(program), 0, 0)


if __name__ == "__main__":
    main()
