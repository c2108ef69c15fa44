"""Runs a program that a model wrote, in a process that gives up what the program must not have.

Started as a plain script (`python -I confined.py`, standard library only) in an empty folder, by
`sandbox.py`, which also watches the clock, the folder's size and the answer's. Standard input has
`{program, token, memory_bytes, cpu_s, file_bytes}` as JSON. What the kernel lets a process give up
for good is given up before the program begins:

- Memory, processor time, size of a file, open files, core dumps: resource limits.
- The file system (Landlock): the interpreter and the system's libraries can be read, the folder can
  be written, nothing else exists. `/proc`, with the environments of other processes, neither.
- Other processes, the network and the kernel's stranger doors (seccomp): no second process or
  thread, no other program, no socket, no signal.
- The network once more (a namespace of its own), where that is permitted.
- The capabilities of root.

The answer is one line of JSON: `{token, held, error}`. `held` names what took effect. A program
that ends by itself, by `os._exit` say, gives no answer, and so has not passed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import struct
import sys
from collections.abc import Callable

LONGEST_ERROR = 300
_LIBC = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SIGKILL = 9


class Refused(OSError):
    """The kernel does not do it here."""


def _syscall(number: int, *arguments: object) -> int:
    result: int = _LIBC.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise Refused(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _prctl(option: int, *arguments: object) -> None:
    padded = [*arguments, *[ctypes.c_ulong(0)] * (4 - len(arguments))]
    if _LIBC.prctl(option, *padded) != 0:
        raise Refused(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# ---- resources -----------------------------------------------------------------------------------


def limit_resources(memory_bytes: int, cpu_s: int, file_bytes: int) -> None:
    """Bounds that hold everywhere."""
    for name, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 0),  # of a user other than root
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (most, most))


# ---- the file system -----------------------------------------------------------------------------

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_READ = _EXECUTE | _READ_FILE | _READ_DIR
# Rights of the file system by version of the interface: bits 0 to 12, then one more each time.
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_NEWEST_RIGHTS = 16
_TCP = 0b11  # bind and connect, from version 4 on
_SCOPES = 0b11  # abstract sockets and signals, from version 6 on


def wall_off_files(folder: str) -> None:
    """Let only the interpreter be read, and only the folder be written.

    Raises:
        Refused: There is no Landlock here.
    """
    version = _syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    rights = (1 << _RIGHTS.get(version, _NEWEST_RIGHTS)) - 1
    attributes = [rights]
    attributes += [_TCP] if version >= 4 else []  # noqa: PLR2004 - the interface's version
    attributes += [_SCOPES] if version >= 6 else []  # noqa: PLR2004
    packed = struct.pack(f"{len(attributes)}Q", *attributes)
    rules = _syscall(_LANDLOCK_CREATE, packed, ctypes.c_size_t(len(packed)), ctypes.c_uint32(0))
    for path in sorted(readable()):
        _allow(rules, path, _READ)
    for path, more in (("/dev/null", _WRITE_FILE), ("/dev/urandom", 0), ("/dev/zero", 0)):
        _allow(rules, path, _READ_FILE | more)
    _allow(rules, folder, rights)
    _syscall(_LANDLOCK_RESTRICT, ctypes.c_int(rules), ctypes.c_uint32(0))
    os.close(rules)


def readable() -> set[str]:
    """Folders of the interpreter, its packages and the libraries that both are linked with."""
    packages = {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    return {sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", *packages}


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    rule = struct.pack("=Qi", rights, place)
    with contextlib.suppress(Refused):  # rights of a folder on what is none
        _syscall(_LANDLOCK_ADD, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint32(0))
    os.close(place)


# ---- the network ---------------------------------------------------------------------------------

_NEW_USERS, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x40000000, 0x08000000


def leave_network() -> None:
    """Go where there is no network but a loopback of one's own, which is down.

    Raises:
        Refused: It is not permitted.
    """
    uid, gid = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEW_USERS | _NEW_NETWORK | _NEW_IPC) != 0:
        raise Refused(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)


# ---- other processes, and the rest of the kernel -------------------------------------------------

# name -> number on x86_64 and on aarch64; None where there is no such call.
_FORBIDDEN: dict[str, tuple[int | None, int | None]] = {
    # another process, thread or program
    "clone": (56, 220),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    # the network; io_uring opens sockets, too
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    # signals to others
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    # a look into others
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    # what a limit, a namespace or a mount would be changed by
    "setrlimit": (160, 164),
    "prlimit64": (302, 261),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "setpriority": (141, 140),
    # doors that are seldom used and often broken in through
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
}
_CLONE3 = 435  # its flags cannot be looked at; told that there is none, libc asks by `clone`
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32 = 0x40000000  # numbers of x86_64's other interface begin here

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE = 0, 4  # where they are in what the filter is shown
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38


def filter_program(machine: str) -> bytes:
    """The seccomp filter of a machine's architecture: classic BPF, eight bytes an instruction.

    Raises:
        Refused: The numbers of its calls are not known here.
    """
    if machine not in _ARCHITECTURES:
        raise Refused(_ENOSYS, f"no filter for {machine}")
    column, architecture = _ARCHITECTURES[machine]
    steps: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        steps += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    steps += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    for numbers in _FORBIDDEN.values():
        if (number := numbers[column]) is not None:
            steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    steps.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_void_p)]


def forbid_calls() -> None:
    """No second process or thread, no other program, no socket, no signal to anybody.

    Raises:
        Refused: The kernel has no seccomp filters, or the architecture is another.
    """
    program = filter_program(platform.machine())
    buffer = ctypes.create_string_buffer(program, len(program))
    wanted = _Filter(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    _prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(wanted))


def drop_capabilities() -> None:
    """What root may do beside what its files allow.

    Raises:
        Refused: The kernel has none.
    """
    column = {"x86_64": 126, "aarch64": 91}.get(platform.machine())
    if column is None:
        raise Refused(_ENOSYS, "capset")
    header = struct.pack("=Ii", 0x20080522, 0)
    _syscall(column, header, bytes(24))


# ---- the program ---------------------------------------------------------------------------------


def confine(asked: dict[str, int], folder: str) -> list[str]:
    """Give everything up; returns the names of what could be."""
    limit_resources(asked["memory_bytes"], asked["cpu_s"], asked["file_bytes"])
    held = ["resources"]
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("", lambda: _prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(_SIGKILL))),
        ("network", leave_network),
        ("", lambda: _prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1))),
        ("files", lambda: wall_off_files(folder)),
        ("capabilities", drop_capabilities),
        ("calls", forbid_calls),
    )
    for name, step in steps:
        # Elsewhere than on Linux libc has none of the functions.
        with contextlib.suppress(Refused, AttributeError):
            step()
            held += [name] if name else []
    return held


def run(program: str) -> str | None:
    """What went wrong, in one line; None when the program came to its end."""
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})  # noqa: S102 - what all this is for
    except BaseException as error:  # noqa: BLE001 - also SystemExit: it did not come to its end
        return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_ERROR]
    return None


def main() -> int:
    asked = json.load(sys.stdin)
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    held = confine(asked, os.getcwd())
    error = run(asked["program"])
    told = json.dumps({"token": asked["token"], "held": held, "error": error})
    os.write(answer, told.encode())
    # At once: threads and exit handlers of the program are not waited for.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
