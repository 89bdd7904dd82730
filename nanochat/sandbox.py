"""The inside of the sandbox: what a fresh interpreter runs so that a program can do no harm.

`nanochat.execution` starts it as a main program (`python -I -S`); it imports the standard library only.
Three processes, so that whoever judges the program is out of its reach:

    R  the runner: makes the namespaces, waits, and at the end kills and collects every process
    S  the supervisor, pid 1 in there: hears how the program ended, runs the tests, writes the report
    C  the program: gives up every right, then runs, then answers the calls that the tests make

S reads the tests only after C has been forked, so they are nowhere in C's memory; and C's answers are
plain data that S builds itself, so that no object of the program's takes part in a comparison.

Layers, each tried, each reported when it holds:

    namespaces  a root folder of its own with the standard library, read-only, and 32 MiB at /tmp; no
                network, no other processes, no /proc; a user id of its own where we are root
    landlock    the kernel refuses every file but the same ones, and all of TCP
    seccomp     the kernel refuses every system call but those below: no other process, no program
                started, no socket but pairs, no signal to others
    limits      memory, CPU time, size and number of files, number of threads

Without namespaces nothing at all can be written (there is no file system to limit), the program can see
that a file exists, though not what is in it, and threads are limited by the memory for their stacks only.

Sources: the man pages unshare(2), pivot_root(2), mount_setattr(2), landlock(7), seccomp(2), capabilities(7),
prctl(2); Documentation/userspace-api/landlock.rst of the kernel; its headers for every number.
"""

from __future__ import annotations

import _signal as signal  # `signal` would bring enum, and with it a third of the start-up time
import builtins
import ctypes
import marshal
import os
import sys

LAYERS = ("namespaces", "landlock", "seccomp", "limits")
NO_NAMESPACES = 3  # exit code of R: start me again without them
MAX_LINE = 2 * 1024 * 1024  # of what S reads from C at a time: an answer of 1 MiB, in hex
WRITABLE = "/tmp"  # with namespaces
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def is_safe(layers) -> bool:
    """Whether a program under these layers reaches neither files nor the network and cannot outlive its time."""
    return "limits" in layers and ("namespaces" in layers or {"landlock", "seccomp"} <= set(layers))


# -----------------------------------------------------------------------------
# Three processes


def main() -> None:
    """R. Returns in C alone, whose interpreter then ends as that of any program does."""
    start, end, report, parent = map(int, sys.argv[1:])
    sys.argv[1:] = []
    request = marshal.loads(os.pread(0, end - start, start))
    active = []
    if "namespaces" in request["layers"]:
        try:
            enter_namespaces(os.getcwd())
        except (OSError, AttributeError):  # refused, or not Linux
            os._exit(NO_NAMESPACES)
        active.append("namespaces")
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)  # it died before we said so
    if is_linux():
        call("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come to us
        call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE, for S and C too: none looks into the others
    signal.signal(signal.SIGCHLD, lambda *_: None)  # where it is ignored, sigwait might not see it
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD, signal.SIGTERM))
    supervisor = os.fork()
    if supervisor == 0:
        return supervise(report, request, end, active)
    try:
        os.setpgid(supervisor, supervisor)  # S and C are a group, R stays outside to collect it
    except OSError:
        pass  # it has ended already
    # SIGTERM: the time is up. SIGCHLD: S has ended, or an orphan that came to us.
    while signal.sigwait((signal.SIGCHLD, signal.SIGTERM)) == signal.SIGCHLD:
        if os.waitpid(supervisor, os.WNOHANG)[0]:
            break
    try:
        os.killpg(supervisor, signal.SIGKILL)
    except OSError:
        pass  # nothing is left
    try:
        while True:
            os.wait()
    except ChildProcessError:
        os._exit(0)


def supervise(report: int, request: dict, end: int, active: list) -> None:
    """S. Starts C, hears it out, runs the tests if there are any, and writes the report. Returns in C alone."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    die_with_parent()
    os.write(report, b"\n")  # fails where our starter has ended by now, and R with it
    if request["function"]:
        import json  # noqa: F401  both sides need it; once here is cheaper than twice
    nonce = os.urandom(16).hex()  # a program that writes to every descriptor does not hit upon it
    questions, ask = os.pipe()
    answer, answers = os.pipe()[::-1]
    me = os.getpid()
    program = os.fork()
    if program == 0:
        os.close(report)
        return run_program(request, active, me, questions, answer, nonce)
    os.close(questions)
    os.close(answer)
    try:
        channel = {"ask": ask, "answers": answers, "nonce": nonce, "buffer": bytearray(), "broken": False}
        kind, layers = hear(channel)
        os.write(report, f"{layers}\n".encode())
        if kind == "layers" and not (is_safe(layers.split()) or request["allow_unsafe"]):
            status, error = "refused", ""
        else:
            status, error = judge(program, channel, request, end, active)
    except BaseException as fault:
        status, error = "failed", f"the supervisor failed: {describe(fault)}"
    os.write(report, f"{status}\n{error[:500]}\0".encode("utf-8", "backslashreplace"))
    os._exit(0)


def judge(program: int, channel: dict, request: dict, end: int, active: list) -> tuple[str, str]:
    """How C, which is about to run the program, fares: "ended" and "", or "failed" and why."""

    def left(but="exit code {} after the end", fine=False):
        code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
        if code < 0:
            return f"killed by signal {-code}"
        return "" if fine and code == 0 else but.format(code)

    kind, error = hear(channel)
    if kind == "failed":
        left()
        return "failed", error
    if kind != "ended":
        return "failed", "spoke out of turn" if channel["broken"] else left("left early with code {}")
    if request["function"]:
        confine(request, active)
        error = run_tests(channel, marshal.loads(os.pread(0, os.fstat(0).st_size, end)))
        if error is not None:
            return "failed", error
    os.close(channel["ask"])
    error = left(fine=True)
    return ("failed" if error else "ended"), error


def run_tests(channel: dict, request: dict) -> str | None:
    """In S: the prompt, a fake for the function, and the tests, which call C through it. Why they fail, or None."""
    import json

    def stand_in(*args, **kwargs):
        send(channel["ask"], json.dumps([to_plain(args), to_plain(kwargs)]))
        kind, text = hear(channel)
        if kind == "raised":
            name, _, message = text.partition(" ")
            error = getattr(builtins, name, None)
            if not (isinstance(error, type) and issubclass(error, Exception)):
                error = RuntimeError
            try:
                raise error(message)
            except TypeError as unfit:  # UnicodeDecodeError wants five arguments
                raise (unfit if error is TypeError else RuntimeError(message)) from None
        if kind == "value":
            try:
                return from_plain(json.loads(text))
            except (ValueError, TypeError, RecursionError, MemoryError):
                pass
        channel["broken"] = True  # whatever the tests make of this error: they have failed
        raise RuntimeError("the program ended during a call" if kind is None else "the answer is no plain value")

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    module = sys.modules["__main__"] = type(sys)("__main__")
    error = execute(request["prompt"], "prompt.py", module)
    if error is None:
        setattr(module, request["function"], stand_in)
        error = execute(request["tests"], "tests.py", module)
    return "the program ended during a call" if error is None and channel["broken"] else error


def run_program(request: dict, active: list, parent: int, questions: int, answer: int, nonce: str) -> None:
    """C. Gives up its rights, runs the program, and answers calls until S has no more."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, fd in enumerate((null, questions, answer)):
        os.dup2(fd, 20 + number)  # first out of the way of one another
    os.dup2(20, 0)
    os.dup2(21, 3)
    os.dup2(22, 4)
    os.closerange(5, 256)  # nothing is above: `subprocess` let in the report only, and S took the lowest numbers

    def say(kind, text=""):
        send(4, f"{nonce} {kind} {text.encode('utf-8', 'backslashreplace').hex()}")

    layers = confine(request, active)
    say("layers", " ".join(layers))
    if not (is_safe(layers) or request["allow_unsafe"]):
        os._exit(1)
    builtins.exit = builtins.quit = sys.exit  # which `site` would have made
    module = sys.modules["__main__"] = type(sys)("__main__")
    error = execute(request["program"], "program.py", module)
    if error is not None:
        say("failed", error)
        sys.exit(1)
    say("ended")
    if request["function"]:
        answer_calls(request["function"], module, say)
    else:
        os.read(3, 1)  # ends with S's side


def answer_calls(function: str, module, say) -> None:
    import json

    for line in open(3, encoding="utf-8", closefd=False):
        try:
            args, kwargs = map(from_plain, json.loads(line))
            value = json.dumps(to_plain(getattr(module, function)(*args, **kwargs)))
            if len(value) > MAX_LINE // 2 - 64:
                raise ValueError(f"an answer of {len(value):,} bytes")
            say("value", value)
        except BaseException as error:
            say("raised", f"{type(error).__name__} {error}"[:500])


# -----------------------------------------------------------------------------
# What they share


def execute(source: str, name: str, module) -> str | None:
    """Run source code as `module`; None when it came to its end, else why not, with a traceback on stderr."""
    try:
        exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
        sys.stdout.flush()
        return None
    except MemoryError:
        module.__dict__.clear()  # make room for saying so
        failure = MemoryError("more than the program may use")
    except BaseException as error:
        failure = error
        failure.__traceback__ = error.__traceback__.tb_next  # our own frame is of no interest
    text = describe(failure)
    sys.__excepthook__(type(failure), failure, failure.__traceback__)
    return text


def describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except BaseException:
        return type(error).__name__[:500]


def send(fd: int, line: str) -> None:
    data = f"{line}\n".encode()
    while data:
        data = data[os.write(fd, data) :]


def hear(channel: dict) -> tuple[str | None, str]:
    """The next (kind, text) from C; (None, "") when there is none to come or it is not what C's runner sends."""
    buffer = channel["buffer"]
    while b"\n" not in buffer and len(buffer) <= MAX_LINE:
        chunk = os.read(channel["answers"], 65536)
        if not chunk:
            return None, ""
        buffer += chunk
    line, _, rest = buffer.partition(b"\n")
    channel["buffer"] = rest
    try:
        nonce, kind, text = line.decode("ascii").split(" ")
        if nonce == channel["nonce"]:
            return kind, bytes.fromhex(text).decode()
    except ValueError:
        pass
    channel["broken"] = True
    return None, ""


def to_plain(value):
    """A value as JSON that keeps what equality sees: subclasses become what they are subclasses of.

    >>> to_plain((1, {"a": [2.5]}))
    ['tuple', [1, ['dict', [['a', ['list', [2.5]]]]]]]
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -(10**18) < value < 10**18 else ["int", hex(value)]  # decimal is limited, and quadratic
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", [[to_plain(key), to_plain(item)] for key, item in dict.items(value)]]
    for kind in (list, tuple, frozenset, set, type({}.keys()), type({}.items())):
        if isinstance(value, kind):
            name = kind.__name__ if kind.__name__ in KINDS else "set"
            return [name, [to_plain(item) for item in value]]
    for kind in (int, float, complex):  # a Fraction or a Decimal that equals one of these
        try:
            if kind(value) == value:
                return to_plain(kind(value))
        except Exception:
            pass
    raise TypeError(f"the value holds a {type(value).__name__}, which is no plain data")


KINDS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def from_plain(data):
    """The other way; whatever it is given, the outcome is made of builtin types only.

    >>> from_plain(["tuple", [1, ["dict", [["a", ["list", [2.5]]]]]]])
    (1, {'a': [2.5]})
    """
    if isinstance(data, dict):
        raise ValueError("not from to_plain")
    if not isinstance(data, list):
        return data
    kind, body = data
    if kind == "int":
        return int(body, 16)
    if kind == "complex":
        return complex(*body)
    if kind == "bytes":
        return bytes.fromhex(body)
    if kind == "dict":
        return {from_plain(key): from_plain(item) for key, item in body}
    if kind not in KINDS:
        raise ValueError("not from to_plain")
    return KINDS[kind](map(from_plain, body))


# -----------------------------------------------------------------------------
# Layers


def is_linux() -> bool:
    return sys.platform == "linux"


def call(name: str, *args) -> int:
    """A function of the C library, which raises OSError where it fails. Integers go as C's long."""
    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, name)
    function.restype = ctypes.c_long if name == "syscall" else ctypes.c_int
    result = function(*[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}{args[:1] if name == 'syscall' else ''} failed")
    return result


def die_with_parent() -> None:
    if is_linux():
        call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG; a change of user clears it


def confine(request: dict, active: list) -> list:
    """Take every right from this process that is not among `active` (its namespaces) already; gives what worked."""
    layers = [*active]
    if "limits" in request["layers"]:
        limit_resources(request, "namespaces" in active)
        layers.append("limits")
    if not is_linux():
        return layers
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which landlock and seccomp want too
    for name, work in (("landlock", restrict_files), ("seccomp", filter_system_calls)):
        if name == "seccomp":
            drop_capabilities()  # not before landlock has opened its folders, not after seccomp forbids it
        if name in request["layers"]:
            try:
                work("namespaces" in active)
                layers.append(name)
            except OSError:
                pass
    return [name for name in LAYERS if name in layers]


def limit_resources(request: dict, own_user: bool) -> None:
    import resource

    limits = {"RLIMIT_AS": request["memory"], "RLIMIT_CPU": request["cpu"], "RLIMIT_FSIZE": request["file"],
              "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0}
    if own_user:
        limits["RLIMIT_NPROC"] = 64  # counts threads too, and all of the user's: only for one of our own
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (ValueError, OSError):
            pass  # macOS knows no limit on memory


def readable() -> list[str]:
    """What an interpreter reads: the standard library, shared libraries and the linker's list of them, time zones."""
    prefixes = {sys.base_prefix, sys.base_exec_prefix}
    paths = {os.path.join(prefix, lib) for prefix in prefixes for lib in ("lib", sys.platlibdir)} | set(sys.path)
    paths |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"}
    chosen = []
    for path in sorted(paths):  # a folder comes before what is in it
        if os.path.exists(path) and not any(path.startswith(f"{folder}/") for folder in chosen):
            chosen.append(path)
    return chosen


def enter_namespaces(root: str) -> None:
    """Leave this machine's files, network, processes and user; `root`, an empty folder, becomes the root folder.

    After a failure we are somewhere in between, and the caller must end.
    """
    uid, gid = os.getuid(), os.getgid()
    parts = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # CLONE_NEWNS, NEWUTS, NEWIPC, NEWPID, NEWNET
    own_user = uid == 0
    try:
        call("unshare", parts)
    except PermissionError:  # not root, or a root that may not: then a user namespace, where we may
        own_user = False
        call("unshare", parts | 0x10000000)  # CLONE_NEWUSER
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    if own_user:
        uid = gid = 2**30 + os.getpid()  # nobody has it, so nothing belongs to it, and its processes can be counted

    nosuid_nodev, bind, rec, private = 2 | 4, 4096, 16384, 1 << 18
    call("mount", None, b"/", None, rec | private, None)  # what follows is seen by us only
    mount = root.encode()
    call("mount", b"tmpfs", mount, b"tmpfs", nosuid_nodev, b"size=1m,nr_inodes=1k,mode=0755")
    os.umask(0o022)
    os.mkdir(root + WRITABLE)
    options = f"size=32m,nr_inodes=4k,mode=0700,uid={uid},gid={gid}"
    call("mount", b"tmpfs", mount + WRITABLE.encode(), b"tmpfs", nosuid_nodev, options.encode())
    for path in [*readable(), *DEVICES]:
        os.makedirs(root + (path if os.path.isdir(path) else os.path.dirname(path)), exist_ok=True)
        if not os.path.isdir(path):
            os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY, 0o644))
        call("mount", os.fsencode(path), os.fsencode(root + path), None, bind | rec, None)
    read_only, recursive = 1, 0x8000  # MOUNT_ATTR_RDONLY (NOSUID is 2), AT_RECURSIVE
    set_mount = lambda path, flags, on, off: call(  # noqa: E731  struct mount_attr: attr_set, attr_clr, propagation, userns_fd
        "syscall", 442, -100, os.fsencode(path), flags, (ctypes.c_uint64 * 4)(on, off, 0, 0), 32
    )
    set_mount(root, recursive, read_only | 2, 0)
    set_mount(root + WRITABLE, 0, 0, read_only)
    os.chdir(root)
    call("syscall", {"x86_64": 155, "aarch64": 41}[os.uname().machine], b".", b".")  # pivot_root: "." twice, as its page says
    call("umount2", b".", 2)  # MNT_DETACH: the old root was mounted over the new one
    os.chdir(WRITABLE)
    if own_user:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)


def restrict_files(namespaces: bool) -> None:
    """Landlock: read what an interpreter reads, write to the devices and, with namespaces, to the own folder."""
    abi = call("syscall", 444, None, 0, 1)  # landlock_create_ruleset(LANDLOCK_CREATE_RULESET_VERSION)
    if abi < 3 and not namespaces:
        raise OSError("before version 3 files could be truncated")
    # access_fs.h: execute 1, write 2, read 4, list 8, then removing and making; bits were added by versions 2, 3 and 5
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    attributes = (ctypes.c_uint64 * 3)(files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)  # TCP; signals, abstract sockets
    rules = call("syscall", 444, attributes, 24 if abi >= 6 else 16 if abi >= 4 else 8, 0)
    allowed = [(path, 4 | 8 if os.path.isdir(path) else 4) for path in [*readable(), *([] if namespaces else [os.getcwd()])]]
    allowed += [(path, 2 | 4) for path in DEVICES]
    if namespaces:
        allowed.append((WRITABLE, files & ~(1 | 1 << 6 | 1 << 11)))  # all but running programs and making devices
    for path, rights in allowed:
        fd = os.open(path, 0o10000000 | os.O_CLOEXEC)  # O_PATH
        rule = (ctypes.c_uint32 * 3)(rights, 0, fd)  # a packed struct: 64 bits of rights, 32 of descriptor
        call("syscall", 445, rules, 1, rule, 0)  # landlock_add_rule(LANDLOCK_RULE_PATH_BENEATH)
        os.close(fd)
    call("syscall", 446, rules, 0)  # landlock_restrict_self
    os.close(rules)


def drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    call("capset", header, (ctypes.c_uint32 * 6)())


# name:number on x86_64/number on aarch64. What CPython, its threads and asyncio need, and nothing that
# reaches another process, the network or another file's permissions; nor fallocate, which reserves space
# beyond the end of the output file and so beyond RLIMIT_FSIZE.
SYSTEM_CALLS = """
read:0/63 write:1/64 readv:19/65 writev:20/66 pread64:17/67 pwrite64:18/68 lseek:8/62 open:2/- openat:257/56 close:3/57
close_range:436/436 stat:4/- lstat:6/- fstat:5/80 newfstatat:262/79 statx:332/291 access:21/- faccessat:269/48
faccessat2:439/439 readlink:89/- readlinkat:267/78 getdents64:217/61 getcwd:79/17 chdir:80/49 fchdir:81/50 mkdir:83/-
mkdirat:258/34 rmdir:84/- unlink:87/- unlinkat:263/35 rename:82/- renameat:264/38 renameat2:316/276 link:86/-
linkat:265/37 symlink:88/- symlinkat:266/36 truncate:76/45 ftruncate:77/46 fsync:74/82 fdatasync:75/83
umask:95/166 dup:32/23 dup2:33/- dup3:292/24 pipe:22/- pipe2:293/59 sendfile:40/71 copy_file_range:326/285
brk:12/214 mmap:9/222 munmap:11/215 mremap:25/216 mprotect:10/226 madvise:28/233 msync:26/227
futex:202/98 set_robust_list:273/99 rseq:334/293 set_tid_address:218/96 gettid:186/178 getpid:39/172 sched_yield:24/124
sched_getaffinity:204/123 getcpu:309/168 exit:60/93 exit_group:231/94 wait4:61/260
rt_sigaction:13/134 rt_sigprocmask:14/135 rt_sigreturn:15/139 rt_sigpending:127/136 rt_sigtimedwait:128/137
rt_sigsuspend:130/133 sigaltstack:131/132 pause:34/- alarm:37/- setitimer:38/103 getitimer:36/102
restart_syscall:219/128
clock_gettime:228/113 clock_getres:229/114 clock_nanosleep:230/115 nanosleep:35/101 gettimeofday:96/169 time:201/-
times:100/153 getrusage:98/165
getuid:102/174 geteuid:107/175 getgid:104/176 getegid:108/177 getgroups:115/158 getresuid:118/148 getresgid:120/150
getppid:110/173 getpgrp:111/- getpgid:121/155 getsid:124/156 uname:63/160 sysinfo:99/179 getrandom:318/278
poll:7/- ppoll:271/73 select:23/- pselect6:270/72 epoll_create1:291/20 epoll_ctl:233/21 epoll_wait:232/-
epoll_pwait:281/22 eventfd2:290/19 recvfrom:45/207 sendto:44/206 shutdown:48/210 getsockopt:55/209 getsockname:51/204
getpeername:52/205
clone:56/220 clone3:435/435 kill:62/129 tgkill:234/131 prlimit64:302/261 socketpair:53/199 fcntl:72/25 ioctl:16/29
"""


def filter_system_calls(namespaces: bool) -> None:
    """seccomp: a program in the kernel's own small language reads each call and lets it pass or fail."""
    column, arch = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}.get(os.uname().machine, (None, 0))
    if column is None or sys.maxsize < 2**32:
        raise OSError("no list of system calls for this machine")
    numbers = {}
    for entry in SYSTEM_CALLS.split():
        name, _, both = entry.partition(":")
        if both.split("/")[column] != "-":
            numbers[name] = int(both.split("/")[column])

    # linux/bpf_common.h; each instruction is (code, jump if true, jump if false, constant)
    load = lambda offset: (0x20, 0, 0, offset)  # noqa: E731
    argument = lambda index: load(16 + 8 * index)  # noqa: E731  its lower half: all of ours are 32 bits wide
    equal = lambda value, yes, no: (0x15, yes, no, value)  # noqa: E731
    above = lambda value, yes, no: (0x25, yes, no, value)  # noqa: E731
    any_bit = lambda mask, yes, no: (0x45, yes, no, mask)  # noqa: E731
    ret = lambda value: (0x06, 0, 0, value)  # noqa: E731
    allow, kill = ret(0x7FFF0000), ret(0x80000000)
    fail = lambda errno: ret(0x00050000 | errno)  # noqa: E731
    no = fail(13)  # EACCES

    thread = 0x00010000  # CLONE_THREAD; the other flags are those that C libraries use for a thread
    checks = {
        "clone": [argument(0), any_bit(~0x007D0F00 & 0xFFFFFFFF, 1, 0), any_bit(thread, 1, 0), no, allow],
        "clone3": [fail(38)],  # ENOSYS: its flags are out of sight, so C libraries fall back on clone
        "kill": [argument(0), equal(os.getpid(), 1, 0), no, allow],
        "tgkill": [argument(0), equal(os.getpid(), 1, 0), no, allow],
        "prlimit64": [argument(0), equal(0, 1, 0), no, allow],
        "socketpair": [argument(0), equal(1, 0, 4),  # AF_UNIX, SOCK_STREAM with or without NONBLOCK and CLOEXEC
                       argument(1), (0x54, 0, 0, ~0x00080800 & 0xFFFFFFFF), equal(1, 0, 1), allow, no],
        # F_DUPFD to F_SETLKW but not F_SETOWN, which sends signals; F_DUPFD_CLOEXEC
        "fcntl": [argument(1), equal(1030, 2, 0), above(7, 0, 1), no, allow],
        "ioctl": [argument(1), equal(0x5421, 3, 0), equal(0x5450, 2, 0), equal(0x5451, 1, 0), no, allow],  # FIONBIO, FIO(N)CLEX
    }
    program = [load(4), equal(arch, 1, 0), kill, load(0)]
    for name, number in numbers.items():
        check = checks.get(name, [allow])
        program += [equal(number, 0, len(check)), *check]
    program.append(no)  # the numbers of x32 are among the rest

    code = b"".join(c.to_bytes(2, "little") + bytes((yes, no)) + k.to_bytes(4, "little") for c, yes, no, k in program)
    filter_ = ctypes.create_string_buffer(code, len(code))
    fprog = (ctypes.c_uint64 * 2)(len(program), ctypes.addressof(filter_))  # struct sock_fprog: length, padding, pointer
    call("prctl", 22, 2, ctypes.byref(fprog), 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


if __name__ == "__main__":
    main()
