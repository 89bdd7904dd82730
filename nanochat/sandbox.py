"""The inside of the sandbox: a fresh interpreter runs this file, gives up every right it can, and runs the program.

`nanochat.execution` starts it with `python -I -S`; it imports the standard library only. There are two processes: the
judge forks the program, learns how it ended, runs the tests and writes the report. The judge reads the tests after the
fork, and only plain data crosses between the two: the program can neither read nor patch the tests, and no object of
it takes part in a comparison. What the tests print is discarded, and landlock keeps them out of the program's folder.
Each process confines itself in layers, all of them optional and reported when active:

    namespaces  a root folder of its own with the standard library, read-only, and 32 MiB at /tmp; no network, no
                other processes, no /proc; a user id of its own if we are root
    landlock    the kernel refuses access to all other files, and TCP
    seccomp     the kernel refuses all system calls but SYSTEM_CALLS: no other process or program, no sockets but
                pairs, no signals to others
    limits      memory, CPU time, size and number of files, number of threads

Without namespaces nothing can be written, and the program can see that a file exists (not its contents). Sources: the
man pages of the system calls, the kernel's userspace-api/landlock.rst, and its headers for every number.
"""

import _signal as signal  # `signal` and `socket` import enum, a third of the start-up time
import _socket as socket
import builtins
import ctypes
import marshal
import os
import resource
import sys

LAYERS = ("namespaces", "landlock", "seccomp", "limits")
WRITABLE = "/tmp"  # with namespaces
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def is_safe(layers) -> bool:
    """Whether a program under these layers reaches neither files nor network and cannot outlive its time."""
    return "limits" in layers and ("namespaces" in layers or {"landlock", "seccomp"} <= set(layers))


def main() -> None:
    """The judge. Returns in the program's process only, whose interpreter then exits as that of any program."""
    inherited, parent = int(sys.argv.pop(1)), int(sys.argv.pop(1))
    report = os.dup(inherited)  # a low number, which `run_program` closes
    os.close(inherited)
    requests = open(0, "rb", buffering=0, closefd=False)  # unbuffered: what follows the request is not read yet
    request = marshal.load(requests)
    layers = []
    try:  # root may start any number of threads, so take another real user id; the effective one still opens files
        os.setresuid(2**30 + os.getpid(), -1, -1)
    except (OSError, AttributeError):
        pass
    # The kernel counts our user's threads in all containers, which /proc does not show: try how many are at most there
    request["threads"] = next(filter(can_start_thread, (2**exponent for exponent in range(31))), 1)
    # Before the fork, as landlock stops signals between siblings
    confine(request, layers, namespaces=enter_namespaces, limits=limit_resources, landlock=restrict_files)
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)  # it died before we asked for that
    secret = os.urandom(16)  # starts each message, so that a program cannot forge one by writing to every descriptor
    ours, theirs = (end.detach() for end in socket.socketpair())
    program = os.fork()
    if program == 0:
        return run_program(request, layers, theirs, secret)
    os.close(theirs)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(program, signal.SIGKILL))  # timeout: so that we can collect it
    for stream in (1, 2):  # the program can read these files, and so what tests would print
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    request["may_kill"] = program
    try:
        confine(request, layers, landlock=restrict_files, seccomp=filter_system_calls)
        error = judge(request, program, open(ours, "rb"), secret, requests, report)
    except BaseException as failure:
        error = f"the sandbox failed: {describe(failure)}"
    os.write(report, f"\n{'ended' if error is None else 'failed'}\n{error!s:.500}".encode("utf-8", "backslashreplace"))
    os._exit(0)


def judge(request: dict, program: int, channel, secret: bytes, requests, report: int) -> str | None:
    """Why the program or its tests failed, or None."""
    kind, layers = receive(channel, secret)
    if kind is None:
        raise RuntimeError("no process for the program")
    os.write(report, f"{kind} {layers}".encode())
    if is_safe(layers.split()) or request["allow_unsafe"]:
        send(channel.fileno(), "run")
        kind, error = receive(channel, secret)
    else:
        kind, error = "failed", "too few layers"
    tests = marshal.load(requests)
    if kind == "ended" and tests is not None:
        error = run_tests(channel, secret, tests)
    channel.close()  # ends the other process
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    if error:
        return f"{error}"
    if kind != "ended" or code:
        when = "after its end" if kind == "ended" else "early"
        return f"killed by signal {-code}" if code < 0 else f"left {when} with code {code}"


def run_tests(channel, secret: bytes, source: str) -> str | None:
    """Run tests in which the module `program` stands for the other process. Returns why they failed, or None."""

    def remote(name):
        def function(*args, **kwargs):
            send(channel.fileno(), name, plain(args), plain(kwargs))
            kind, value = receive(channel, secret)
            if kind == "value":
                return plain(value)  # marshal can also carry code and a class
            if kind != "raised":
                raise SystemExit("the program ended during a call")  # tests that expect an Exception do not catch it
            error, _, message = f"{value}".partition(": ")
            error = getattr(builtins, error, None)
            if not (isinstance(error, type) and issubclass(error, Exception)) or error in (StopIteration, StopAsyncIteration):
                error = RuntimeError  # those two would end a loop of the tests, as in all(map(f, cases))
            raise error(message)

        return function

    module = sys.modules["program"] = type(sys)("program")
    module.__getattr__ = remote
    return execute(source, "tests.py")


def run_program(request: dict, layers: list, channel: int, secret: bytes) -> None:
    """Give up the last rights, run the program, answer calls until the channel is closed."""
    die_with_parent()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(channel, 3)
    os.closerange(4, 256)  # no inherited descriptor has a higher number
    calls = open(3, "rb", closefd=False)
    confine(request, layers, seccomp=filter_system_calls)
    send(3, secret, "layers", " ".join(name for name in LAYERS if name in layers))
    marshal.load(calls)  # EOFError if the layers are too few or the judge is already dead
    builtins.exit = builtins.quit = sys.exit  # which the module `site` defines otherwise
    error = execute(request["program"], "program.py")
    module = sys.modules["__main__"]
    send(3, secret, "ended" if error is None else "failed", error)
    if error is not None:
        sys.exit(1)
    while True:
        try:
            name, args, kwargs = marshal.load(calls)
        except EOFError:
            return
        try:
            send(3, secret, "value", plain(getattr(module, name)(*args, **kwargs)))
        except BaseException as failure:
            send(3, secret, "raised", describe(failure))


def execute(source: str, name: str) -> str | None:
    """Run source code as the main module. Returns why it did not come to its end, or None; prints a traceback."""
    module = sys.modules["__main__"] = type(sys)("__main__")
    try:
        exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
        sys.stdout.flush()
        return None
    except MemoryError:
        module.__dict__.clear()  # makes room for the message
        failure = MemoryError("more than the program may use")
    except BaseException as error:
        failure = error
        failure.__traceback__ = error.__traceback__.tb_next  # without our own frame
    sys.__excepthook__(type(failure), failure, failure.__traceback__)
    return describe(failure)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def send(fd: int, *message) -> None:
    data = memoryview(marshal.dumps(message))
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        pass  # the other side has ended, which the next read reports


def receive(channel, secret: bytes) -> tuple:
    """(kind, value) of the program's next message; (None, None) if it has ended or sent anything else."""
    try:
        said, kind, value = marshal.load(channel)
        return (kind, value) if said == secret else (None, None)
    except Exception:
        return None, None


def plain(value):
    """A copy made of builtin types only; subclasses become what they are subclasses of."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    for kind in (list, tuple, set, frozenset, bool, int, float, complex, str, bytes):
        if isinstance(value, kind):
            return kind(map(plain, value)) if kind in (list, tuple, set, frozenset) else kind(value)
    if value is not None:
        raise TypeError(f"a {type(value).__name__} is not plain data")


# -----------------------------------------------------------------------------
# Layers


def call(name: str, *args) -> int:
    """Call a function of the C library, integers as C's long. Raises OSError if it fails."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    function.restype = ctypes.c_long if name == "syscall" else ctypes.c_int
    result = function(*[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}{args[:1] if name == 'syscall' else ''} failed")
    return result


def die_with_parent() -> None:
    if sys.platform == "linux":
        call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG; a change of user clears it
        call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: other processes cannot trace this one


def confine(request: dict, layers: list, **steps) -> None:
    """Apply the layers `steps` to this process, as requested and as far as supported, and add them to `layers`."""
    if sys.platform == "linux":
        call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which landlock and seccomp require
    for name, apply in steps.items():
        try:
            if name == "seccomp":  # drop all capabilities first: _LINUX_CAPABILITY_VERSION_3, this thread
                call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
            if name in request["layers"]:
                apply(request, "namespaces" in layers)
                layers.append(name)
        except (OSError, AttributeError, KeyError, ValueError):
            pass  # not supported or not allowed here; having given up some rights already does no harm


def limit_resources(request: dict, namespaces: bool) -> None:
    limits = {"CPU": request["cpu"], "FSIZE": request["file"], "NOFILE": 64, "CORE": 0}
    limits["NPROC"] = 64 if namespaces else 64 + request["threads"]  # counts all threads of the user
    for name, value in {**limits, "AS": request["memory"]}.items():
        set_limit(name, value)  # macOS cannot limit memory
    if request["threads"] == 1:
        raise OSError("NPROC does not limit this user")


def set_limit(name: str, value: int) -> None:
    """Set a resource limit for good, or keep it where a lower one is in force."""
    kind = getattr(resource, f"RLIMIT_{name}")
    value = min(value, resource.getrlimit(kind)[1] % 2**63)  # -1 stands for no limit
    resource.setrlimit(kind, (value, value))


def can_start_thread(limit: int) -> bool:
    """Whether a process of our user without capabilities, which lift the limit, can start another under this limit."""
    child = os.fork()
    if child == 0:
        try:
            confine({"layers": ()}, [], seccomp=None)  # drops the capabilities only
            set_limit("NPROC", limit)
            os._exit(os.fork() and os.wait()[1])  # 0 in both processes
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def readable() -> list[str]:
    """What an interpreter reads: the standard library, shared libraries and the linker's list of them, time zones."""
    prefixes = {sys.base_prefix, sys.base_exec_prefix}
    paths = {os.path.join(prefix, lib) for prefix in prefixes for lib in ("lib", sys.platlibdir)} | set(sys.path)
    paths |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"}
    return sorted(filter(os.path.exists, paths))  # a folder comes before its contents


def enter_namespaces(request: dict, namespaces: bool) -> None:
    """Leave this machine's files, network, processes and user; the current, empty folder becomes the root folder."""
    root = os.getcwd()
    uid, gid = os.geteuid(), os.getgid()
    new = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # CLONE_NEWNS, NEWUTS, NEWIPC, NEWPID, NEWNET
    try:
        call("unshare", new)
        uid = gid = os.getuid()  # owns nothing
    except PermissionError:  # not root, or a root without this right: then in a user namespace, which gives it
        call("unshare", new | 0x10000000)  # CLONE_NEWUSER
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)

    # the new root: bind mounts of what an interpreter reads, and /tmp
    nosuid_nodev, bind, rec, private = 2 | 4, 4096, 16384, 1 << 18
    mount, tmp = os.fsencode(root), os.fsencode(root + WRITABLE)
    call("mount", None, b"/", None, rec | private, None)  # nobody else sees the mounts that follow
    call("mount", b"tmpfs", mount, b"tmpfs", nosuid_nodev, b"size=1m,nr_inodes=1k,mode=0755")
    os.umask(0o022)
    os.mkdir(tmp)
    options = f"size=32m,nr_inodes=4k,mode=0700,uid={uid},gid={gid}"
    call("mount", b"tmpfs", tmp, b"tmpfs", nosuid_nodev, options.encode())
    for path in [*readable(), *DEVICES]:
        os.makedirs(root + (path if os.path.isdir(path) else os.path.dirname(path)), exist_ok=True)
        if not os.path.exists(root + path):
            os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY, 0o644))
        call("mount", os.fsencode(path), os.fsencode(root + path), None, bind | rec, None)

    # all of it read-only but /tmp. struct mount_attr: attr_set, attr_clr, propagation, userns_fd
    read_only, nosuid, recursive = 1, 2, 0x8000  # MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, AT_RECURSIVE
    call("syscall", 442, -100, mount, recursive, (ctypes.c_uint64 * 4)(read_only | nosuid), 32)  # mount_setattr
    call("syscall", 442, -100, tmp, 0, (ctypes.c_uint64 * 4)(0, read_only), 32)
    os.chdir(root)
    call("syscall", {"x86_64": 155, "aarch64": 41}[os.uname().machine], b".", b".")  # pivot_root, as in its man page
    call("umount2", b".", 2)  # MNT_DETACH: the old root was mounted over the new one
    os.chdir(WRITABLE)
    if uid != os.geteuid():
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)


def restrict_files(request: dict, namespaces: bool) -> None:
    """Landlock: read what an interpreter reads, write to the devices and, with namespaces, to the own folder."""
    judge = "may_kill" in request  # adds rules after the fork: not the folder, which is the program's, but signals to it
    abi = call("syscall", 444, None, 0, 1)  # landlock_create_ruleset(LANDLOCK_CREATE_RULESET_VERSION)
    if abi < 3 and not namespaces:
        raise OSError("before version 3 files could be truncated")
    # access_fs.h: execute 1, write 2, read 4, list 8, then removing and making; versions 2, 3 and 5 added bits
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    attributes = (ctypes.c_uint64 * 3)(files, 3 if abi >= 4 else 0, 3 if abi >= 6 and not judge else 0)  # files, TCP, signals
    rules = call("syscall", 444, attributes, 24 if abi >= 6 else 16 if abi >= 4 else 8, 0)
    allowed = [(path, 4 | 8 if os.path.isdir(path) else 4) for path in readable()] + [(path, 2 | 4) for path in DEVICES]
    if not judge:  # in /tmp all but running programs and making devices
        allowed.append((WRITABLE, files & ~(1 | 1 << 6 | 1 << 11)) if namespaces else (os.getcwd(), 4 | 8))
    for path, rights in allowed:
        fd = os.open(path, 0o10000000 | os.O_CLOEXEC)  # O_PATH
        rule = (ctypes.c_uint32 * 3)(rights, 0, fd)  # a packed struct: 64 bits of rights, 32 of descriptor
        call("syscall", 445, rules, 1, rule, 0)  # landlock_add_rule(LANDLOCK_RULE_PATH_BENEATH)
        os.close(fd)
    call("syscall", 446, rules, 0)  # landlock_restrict_self
    os.close(rules)


# name:number on x86_64/number on aarch64. What CPython, its threads and asyncio need, and nothing that reaches another
# process, the network or another file's permissions. Not fallocate, which reserves space beyond RLIMIT_FSIZE.
SYSTEM_CALLS = """
read:0/63 write:1/64 readv:19/65 writev:20/66 pread64:17/67 pwrite64:18/68 lseek:8/62 open:2/- openat:257/56 close:3/57
close_range:436/436 stat:4/- lstat:6/- fstat:5/80 newfstatat:262/79 statx:332/291 access:21/- faccessat:269/48
faccessat2:439/439 readlink:89/- readlinkat:267/78 getdents64:217/61 getcwd:79/17 chdir:80/49 fchdir:81/50 mkdir:83/-
mkdirat:258/34 rmdir:84/- unlink:87/- unlinkat:263/35 rename:82/- renameat:264/38 renameat2:316/276 link:86/-
linkat:265/37 symlink:88/- symlinkat:266/36 truncate:76/45 ftruncate:77/46 fsync:74/82 fdatasync:75/83 umask:95/166
dup:32/23 dup2:33/- dup3:292/24 pipe:22/- pipe2:293/59 sendfile:40/71 copy_file_range:326/285 brk:12/214 mmap:9/222
munmap:11/215 mremap:25/216 mprotect:10/226 madvise:28/233 msync:26/227 futex:202/98 set_robust_list:273/99 rseq:334/293
set_tid_address:218/96 gettid:186/178 getpid:39/172 sched_yield:24/124 sched_getaffinity:204/123 getcpu:309/168
exit:60/93 exit_group:231/94 wait4:61/260 rt_sigaction:13/134 rt_sigprocmask:14/135 rt_sigreturn:15/139
rt_sigpending:127/136 rt_sigtimedwait:128/137 rt_sigsuspend:130/133 sigaltstack:131/132 pause:34/- alarm:37/-
setitimer:38/103 getitimer:36/102 restart_syscall:219/128 clock_gettime:228/113 clock_getres:229/114
clock_nanosleep:230/115 nanosleep:35/101 gettimeofday:96/169 time:201/- times:100/153 getrusage:98/165 getuid:102/174
geteuid:107/175 getgid:104/176 getegid:108/177 getgroups:115/158 getresuid:118/148 getresgid:120/150 getppid:110/173
getpgrp:111/- getpgid:121/155 getsid:124/156 uname:63/160 sysinfo:99/179 getrandom:318/278 poll:7/- ppoll:271/73
select:23/- pselect6:270/72 epoll_create1:291/20 epoll_ctl:233/21 epoll_wait:232/- epoll_pwait:281/22 eventfd2:290/19
recvfrom:45/207 sendto:44/206 shutdown:48/210 getsockopt:55/209 getsockname:51/204 getpeername:52/205 clone:56/220
clone3:435/435 kill:62/129 tgkill:234/131 prlimit64:302/261 socketpair:53/199 fcntl:72/25 ioctl:16/29
"""


def system_calls(column: int) -> dict[str, int]:
    """The numbers of the allowed system calls, of one of the two columns."""
    rows = [entry.replace(":", "/").split("/") for entry in SYSTEM_CALLS.split()]
    return {name: int(numbers[column]) for name, *numbers in rows if numbers[column] != "-"}


def filter_system_calls(request: dict, namespaces: bool) -> None:
    """seccomp: a program in the kernel's own small language reads each call and lets it pass or fail."""
    column, arch = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}[os.uname().machine]

    # linux/bpf_common.h; each instruction is (code, jump if true, jump if false, constant)
    load = lambda offset: (0x20, 0, 0, offset)  # noqa: E731
    argument = lambda index: load(16 + 8 * index)  # noqa: E731  its lower half: all of ours are 32 bits wide
    equal = lambda value, yes, no: (0x15, yes, no, value)  # noqa: E731
    any_bit = lambda mask, yes, no: (0x45, yes, no, mask)  # noqa: E731
    ret = lambda value: (0x06, 0, 0, value)  # noqa: E731
    allow, kill, no, unknown = ret(0x7FFF0000), ret(0x80000000), ret(0x0005000D), ret(0x00050026)  # EACCES, ENOSYS
    kill_one = [argument(0), equal(request.get("may_kill", os.getpid()), 1, 0), no, allow]
    checks = {
        # CLONE_THREAD, and no other flags than those that C libraries use for a thread
        "clone": [argument(0), any_bit(~0x007D0F00 & 0xFFFFFFFF, 1, 0), any_bit(0x00010000, 1, 0), no, allow],
        "clone3": [unknown],  # its flags are out of sight, so C libraries fall back on clone
        "kill": kill_one,
        "tgkill": kill_one,
        "prlimit64": [argument(0), equal(0, 1, 0), no, allow],
        "socketpair": [argument(0), equal(1, 0, 4),  # AF_UNIX, SOCK_STREAM with or without NONBLOCK and CLOEXEC
                       argument(1), (0x54, 0, 0, ~0x00080800 & 0xFFFFFFFF), equal(1, 0, 1), allow, no],
        # F_DUPFD to F_SETLKW but not F_SETOWN, which sends signals; F_DUPFD_CLOEXEC
        "fcntl": [argument(1), equal(1030, 2, 0), (0x25, 0, 1, 7), no, allow],
        # FIONBIO, FIONCLEX, FIOCLEX
        "ioctl": [argument(1), equal(0x5421, 3, 0), equal(0x5450, 2, 0), equal(0x5451, 1, 0), no, allow],
    }
    program = [load(4), equal(arch, 1, 0), kill, load(0)]
    for name, number in system_calls(column).items():
        check = checks.get(name, [allow])
        program += [equal(number, 0, len(check)), *check]
    program.append(no)  # the numbers of x32 are among the rest

    code = b"".join(c.to_bytes(2, "little") + bytes((yes, no)) + k.to_bytes(4, "little") for c, yes, no, k in program)
    filter_ = ctypes.create_string_buffer(code, len(code))
    fprog = (ctypes.c_uint64 * 2)(len(program), ctypes.addressof(filter_))  # struct sock_fprog
    call("prctl", 22, 2, ctypes.byref(fprog), 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


if __name__ == "__main__":
    main()
