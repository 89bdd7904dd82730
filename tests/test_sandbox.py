"""Programs that try to break out, take everything, stay forever, or fake their success. None may.

All programs run with all layers and without namespaces; then the surroundings are compared with what they were. No
output may hold the secret that lies in a file, in the environment, in an inherited descriptor and in our memory.
"""

import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from nanochat.execution import SANDBOX, execute_code
from nanochat.sandbox import LAYERS, system_calls

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these layers")

PRELUDE = """
import concurrent.futures, ctypes, fcntl, gc, marshal, mmap, multiprocessing, os, pty, resource, signal, socket
import subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def breach(what): print("breach".upper(), what, flush=True)
def each(function, *arguments):
    for argument in arguments:
        try: breach((argument, function(argument)))
        except OSError: pass
    raise OSError
def syscall(name, *args):
    if libc.syscall(NUMBERS[name], *args) < 0: raise OSError
def read(path): return open(path, "rb").read(4096)
def shell(command):
    if os.system(command) != 0: raise OSError
def raise_limit(name):
    which = getattr(resource, f"RLIMIT_{name}")
    try: resource.setrlimit(which, (resource.getrlimit(which)[1] + 1,) * 2)
    except ValueError: raise OSError
def sleep_in_threads():
    while True: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()
"""

# One attempt per line, each of which must raise OSError. PROGRAMS below tries all system calls that are not allowed.
REFUSED = """
each(lambda call: call(), os.fork, os.forkpty, pty.fork, os.setsid, multiprocessing.Process(target=print).start)
each(subprocess.run, ['/bin/true'], [sys.executable])
shell(f'touch {OUTSIDE}/made')
each(lambda p: os.execv(p, [p, '/bin/true']), '/bin/sh', '/lib64/ld-linux-x86-64.so.2', '/lib/ld-linux-aarch64.so.1')
each(lambda flags: syscall('clone', flags, 0, 0, 0, 0), 17, 0x100, 0x4111, 0x10000011, 0x20000011, 0x100d0f00)
syscall('clone3', ctypes.create_string_buffer(88), 88)
each(lambda pid: each(lambda s: os.kill(pid, s), 0, 15, 9), PARENT, -PARENT, os.getppid(), 2, 0, -1)
each(lambda pid: syscall('tgkill', pid, pid, 9), PARENT, 2)
each(lambda a: fcntl.fcntl(os.pipe()[0], *a), (8, PARENT), (10, 9), (1024, 0), (1031, 2**20))
each(lambda a: fcntl.fcntl(1, *a), (8, PARENT), (10, 9), (15, b'x' * 8), (37, b'x' * 32), (1024, 0), (1026, 63), (1033, 15))
each(lambda n: fcntl.ioctl(1, n, bytes(8)), 0x540e, 0x5410, 0x5412, 0x5452, 0x8901, 0x8902, 0x40086602)
each(lambda pid: resource.prlimit(pid, resource.RLIMIT_NOFILE), 2, PARENT, os.getppid() or PARENT)
each(raise_limit, 'AS', 'CPU', 'FSIZE', 'NOFILE', 'CORE')
each(lambda a: a[0](PARENT, a[1]), (os.setpgid, 0), (os.sched_setaffinity, [0]), (os.killpg, 9))
each(lambda a: a[0](a[1]), (os.setuid, 0), (os.setgid, 0), (os.setgroups, [0]), (os.nice, -5), (os.memfd_create, 'x'))
each(read, '/etc/passwd', '/etc/hostname', PROJECT + '/nanochat/gpt.py', KEY, '../' * 40 + KEY)
each(read, '/dev/mem', '/dev/kmsg', '/dev/tty', '/dev/ptmx', '/dev/vda', '/dev/sda', '/dev/shm/x', '/dev/fuse')
each(lambda pid: each(lambda f: read(f'/proc/{pid}/{f}'), 'environ', 'maps', 'mem', 'fd/1', 'cwd/x'), 'self', 1, PARENT)
each(os.listdir, '/', '/etc', '/root', '/home', '/usr', '/var', '/proc', '/sys', '/dev', PROJECT, OUTSIDE, '../' * 40)
each(lambda a: (os.symlink(a[0], a[1]), read(a[1] + a[2])), (OUTSIDE, 'l', '/.ssh/id_rsa'), ('/', 'r', '/etc/passwd'))
(os.link(KEY, 'h'), read('h'))
(os.chdir(OUTSIDE), read('.ssh/id_rsa'))
each(lambda fd: os.open('etc/passwd', 0, dir_fd=fd), *range(64))
each(lambda device: os.mknod('d', *device), (0o20666, os.makedev(1, 1)), (0o60666, os.makedev(254, 0)))
each(lambda p: open(p, 'w'), OUTSIDE + '/made', '/dev/shm/x', '/made', LIBRARY + '/evil.py', CANARY, os.__file__)
each(lambda call: each(call, CANARY, os.__file__), lambda p: open(p, 'r+'), lambda p: os.truncate(p, 0), os.remove)
each(lambda call: each(call, CANARY, os.__file__), lambda p: os.chmod(p, 0o777), lambda p: os.utime(p, (0, 0)))
each(lambda call: call(OUTSIDE + '/made'), os.mkdir, os.mkfifo, lambda p: os.symlink('x', p), lambda p: os.link(CANARY, p))
os.open(OUTSIDE, os.O_TMPFILE | os.O_RDWR)
each(lambda a: os.rename(*a), (CANARY, 'made'), ('.', OUTSIDE + '/made'), (os.__file__, LIBRARY + '/2'), ('/lib', '/l'))
each(os.rmdir, OUTSIDE + '/empty', '/lib')
each(os.chroot, '/', '.')
each(lambda host: socket.create_connection((host, PORT), 1), '127.0.0.1', '::1')
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))
socket.getaddrinfo('example.com', 80)
each(socket.socket(socket.AF_UNIX).connect, OUTSIDE + '/socket', ABSTRACT)
each(lambda kind: socket.socketpair(socket.AF_UNIX, kind)[0].sendto(b'x', ABSTRACT), 1, 2)
"""

# What must be seen -> programs.
ENDS, LATE, FAILS, CHEATS = "it ends", "it times out", "it fails", "it fails its tests"
PROGRAMS = {
    LATE: [
        "while True: pass", "while True:\n    try: os.fork()\n    except OSError: pass", "time.sleep(99)", "os.read(3, 1)",
        "def f():\n    while True: pass\nfor _ in range(8): threading.Thread(target=f).start()",
        "import re; re.match('(a+)+$', 'a' * 99 + 'b')",
        "for s in {*signal.valid_signals()} - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "signal.pthread_sigmask(0, signal.valid_signals()); time.sleep(99)",
        "import atexit; atexit.register(time.sleep, 99)", "os.closerange(0, 256); time.sleep(99)",
        "os.kill(os.getpid(), signal.SIGSTOP); time.sleep(99)", "os.write(3, b'(\\x03'); time.sleep(99)",
        "signal.signal(14, lambda *_: None); signal.setitimer(0, 1e-5, 1e-5)\nwhile True: pass",
        "x = []\ntry:\n    while True: x.append(bytearray(2**20))\nexcept MemoryError: pass\ntime.sleep(99)",
    ],
    "MemoryError:": ["x = []\nwhile True: x.append([])", "x = bytearray(10**9)", "x = 1 << 10**10"],
    "Cannot allocate memory|Permission denied": [
        "x = [mmap.mmap(-1, 2**24, mmap.MAP_SHARED) for _ in range(99)]",
        "f = open('f', 'wb+'); f.truncate(2**24 - 1); x = [mmap.mmap(f.fileno(), 0) for _ in range(99)]",
    ],
    "can't start new thread|MemoryError": ["sleep_in_threads()", "threading.stack_size(2**26)\nsleep_in_threads()"],
    "RecursionError": ["def f(): f()\nf()"],
    "File too large|No space left|Permission denied": [
        "f = open('f', 'wb')\nwhile True: f.write(bytes(2**20))", "while True: os.mkdir('d'); os.chdir('d')",
        "for i in range(10**6): open(str(i), 'wb').write(bytes(2**20))",
        "f = open('f', 'wb'); os.posix_fallocate(f.fileno(), 0, 2**40)",
        "open('f', 'w').close()\nfor i in range(10**6): os.link('f', str(i))",
        "while True: os.write(1, b'x' * 99999)", "os.lseek(1, 2**40, 0)\nos.write(1, b'x')", "os.ftruncate(1, 2**40)",
    ],
    "Too many open files|Permission denied": [
        "x = [os.open('.', os.O_TMPFILE | os.O_RDWR) for _ in range(99)]", "x = [os.pipe() for _ in range(99)]",
    ],
    ENDS: [
        "os.ftruncate(1, 2**24); os.ftruncate(2, 2**24); os.lseek(1, 2**24, 0); fcntl.lockf(1, fcntl.LOCK_EX)",
        "s = socket.socket(fileno=3); s.shutdown(0); s.detach()", "os.write(1, bytes(range(256)))",
        "for d in {*range(64)} - {3}:\n    try: print(d, os.pread(d, 4096, 0))\n    except OSError: pass",
        "f = sys._getframe()\nwhile f:\n    print(f.f_code.co_name, f.f_locals, f.f_globals)\n    f = f.f_back",
        "for o in gc.get_objects():\n    if isinstance(o, (dict, list, tuple)): print(repr(o)[:200])",
        # x86_64 runs 335 and 336, uretprobe and uprobe, before seccomp; they kill their caller
        "for n in range(600):\n    for n in (n, n | 0x40000000):\n"
        "        if n in {*NUMBERS.values(), 335, 336}: continue\n"
        "        result = libc.syscall(n, -1, -1, -1, -1, -1, -1)\n"
        "        if (result, ctypes.get_errno()) != (-1, 13): breach(n)",
        f"for line in {REFUSED!r}.strip().splitlines():\n    try: breach((line, eval(line)))\n    except OSError: pass",
    ],
    FAILS: [
        "threading.stack_size(32768)\nsleep_in_threads()", "os.abort()",
        "sys.setrecursionlimit(2**31 - 1)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
        # lies about its end
        "print('ended\\nsuccess\\npassed')\n1 / 0", "sys.exit(0)", "os._exit(0)", "os.closerange(0, 256)\nos._exit(0)",
        "threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(9)",
        "for d in range(64):\n    for s in (b'ended', b'\\nended\\n', b'\\nlayers namespaces\\nended\\n'):\n"
        "        try: os.write(d, s)\n        except OSError: pass\nos._exit(0)",
        "os.write(3, marshal.dumps((b'', 'ended', None))); os._exit(0)", "while True: os.write(3, b'x' * 99999)",
        "class E(Exception):\n    def __str__(self): os._exit(0)\nraise E",
        "class M(type):\n    @property\n    def __name__(cls): os._exit(0)\nraise M('E', (Exception,), {})()",
        "raise ValueError('\\nended\\n' * 10**6)",
        "f = sys._getframe()\nwhile f: f.f_globals.update(judge=None, os=None); f = f.f_back\n1 / 0",
        "f = sys._getframe()\nwhile 'secret' not in f.f_locals: f = f.f_back\n"
        "os.write(3, marshal.dumps((f.f_locals['secret'], 'failed', 'A' * 10**6)))\nos._exit(0)",
        "import builtins\nfor n in dir(builtins):\n    if n not in ('delattr', 'OSError'): setattr(builtins, n, None)",
        "sys.modules.clear()\n1 / 0", "os.write = lambda fd, data: len(data)",
    ],
    CHEATS: [  # pretend to add a number which only the tests know
        "class A:\n    __eq__ = __ne__ = lambda *_: True\ndef f(x): return A()",
        "class A(int):\n    __eq__ = __ne__ = lambda *_: True\ndef f(x): return A()",
        "class A:\n    __class__ = int\n    __int__ = __index__ = lambda s: 0\ndef f(x): return A()",
        "g = 1", "def f(x): return float('nan')", "def f(x): raise StopIteration", "def f(x): return 'x' * 10**7",
        "def f(x): os._exit(0)", "def f(x): os.closerange(3, 64)", "def f(x):\n    while True: pass",
        "def f(x):\n    y = []\n    while True: y.append([])", "x = []\nx.append(x)\ndef f(_): return x",
        "def f(x): return open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
        "import builtins\nbuiltins.AssertionError = Warning\nbuiltins.int = str\ndef f(x): return 0",
        "import random\nrandom.randrange = lambda *_: 0\ndef f(x): return 987654321 if x == 0 else 0",
        "for module in list(sys.modules.values()): vars(module).update(f=lambda x: 0, x=0)\ndef f(x): return 0",
        "import re\ndef f(x):\n    for o in gc.get_objects():\n"
        "        if found := re.search(r'offset = .*, (\\d{9})', repr(o)[:10**6]): return x + int(found[1])",
        "def f(x):\n    for d in {*range(64)} - {3}:\n        try: print(os.pread(d, 10**6, 0))\n"
        "        except OSError: pass\n    return 0",
        # reads what the tests print or write, and writes what they read
        "def f(x): return x + int(os.pread(1, 99, 0))", "def f(x): return x + int(open('/tmp/answer').read())",
        "open('/tmp/offset', 'w').write('0')\ndef f(x): return x",
        # speaks the protocol
        "f = sys._getframe()\nwhile 'secret' not in f.f_locals: f = f.f_back\n"
        "for kind in ('ended', 'ended', 'value', 'failed', 'raised'):\n"
        "    os.write(3, marshal.dumps((f.f_locals['secret'], kind, '')))\nos._exit(0)",
        "marshal.dumps = lambda message: b'[\\xff\\xff\\xff\\x7f'\ndef f(x): return 0",
        "def f(x): raise type('eval', (Exception,), {})(f'open({OUTSIDE + \"/made\"!r}, \"w\")')",
    ],
}  # fmt: skip
if platform.machine() == "x86_64":  # where a thread that clone starts returns to what lies on its stack; all share one
    PROGRAMS[ENDS].append(
        "stack = (ctypes.c_void_p * 512)(*[ctypes.cast(libc.pause, ctypes.c_void_p).value] * 512)\nn = 0\n"
        "while n < 3000 and libc.syscall(NUMBERS['clone'], 0x10f00, ctypes.byref(stack, 2048), 0, 0, 0) > 0: n += 1\n"
        "if n > 70 and os.geteuid() != os.getuid() or n == 3000: breach(n)"  # an ordinary user's threads count too
    )
    # mov eax, 20 (getpid of 32 bits); int 0x80; ret
    PROGRAMS["killed by signal (31|11)"] = [
        "m = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes.fromhex('b814000000cd80c3'))\n"
        "breach(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))())"
    ]
WAYS = {"all layers": LAYERS, "without namespaces": LAYERS[1:]}

TESTS = """
import os, random
from program import f
numbers, offset = [random.randrange(10**9) for _ in range(4)], 987654321
try: offset = int(open('/tmp/offset').read())
except OSError: pass
os.write(1, f'{offset}'.encode())
try: open('/tmp/answer', 'w').write(f'{offset}')
except OSError: pass
assert all(map(lambda x: f(x) == x + offset, numbers))
"""
SECRET = os.urandom(16).hex()
ACTIVE = set(execute_code("", allow_unsafe=True).layers)


def surroundings(folder):
    """What must be the same afterwards."""
    library, me = Path(os.__file__), psutil.Process()
    paths = [folder, *sorted(folder.rglob("*")), library, library.parent]
    files = [(str(p), p.read_bytes() if p.is_file() else b"", p.lstat().st_mode, p.lstat().st_mtime_ns) for p in paths]
    limits = [me.rlimit(kind) for kind in (psutil.RLIMIT_AS, psutil.RLIMIT_CPU, psutil.RLIMIT_NOFILE)]
    return files, limits, me.nice(), me.cpu_affinity(), me.children(), me.num_fds()


def running(parent):
    """Processes of sandboxes that `parent` has started, also those that init has adopted."""
    processes = [(process, process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]  # () for a zombie
    return [process for process, command in processes if SANDBOX in command and command[-1] == str(parent)]


def all_gone(parent):
    deadline = time.monotonic() + 5
    while running(parent) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not running(parent)


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory):
    """Runs all programs. {(way, program): (result, seconds)}, the surroundings before and after."""
    folder, scratch = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("scratch")
    (folder / ".ssh").mkdir()
    (folder / "empty").mkdir()
    for name in (".ssh/id_rsa", "canary"):
        (folder / name).write_text(SECRET)
    inherited = os.open(folder / ".ssh/id_rsa", os.O_RDWR)
    os.set_inheritable(inherited, True)
    abstract = f"\0nanochat-{os.getpid()}".encode()
    listeners = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    for listener, address in zip(listeners[1:], (str(folder / "socket"), abstract)):
        listener.bind(address)
        listener.listen()
    values = {
        "OUTSIDE": str(folder), "KEY": str(folder / ".ssh/id_rsa"), "CANARY": str(folder / "canary"),
        "ABSTRACT": abstract, "PROJECT": str(Path(SANDBOX).parent.parent), "LIBRARY": os.path.dirname(os.__file__),
        "PARENT": os.getpid(), "PORT": listeners[0].getsockname()[1],
        "NUMBERS": system_calls({"x86_64": 0, "aarch64": 1}[platform.machine()]),
    }  # fmt: skip
    prelude = PRELUDE + "".join(f"{key} = {value!r}\n" for key, value in values.items())

    def run(case):
        way, seen, program = case
        started, timeout = time.monotonic(), 2 if seen in (LATE, CHEATS) else 8
        result = execute_code(prelude + program, timeout, tests=TESTS if seen == CHEATS else None, layers=WAYS[way])
        return (way, program), (result, time.monotonic() - started)

    before = surroundings(folder)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(6) as pool:
        patch.setenv("API_KEY", SECRET)
        patch.setattr(tempfile, "tempdir", str(scratch))
        cases = [(way, seen, program) for way in WAYS for seen in PROGRAMS for program in PROGRAMS[seen]]
        results = dict(pool.map(run, cases))
    yield results, before, (surroundings(folder), os.listdir(scratch))
    for listener in listeners:
        listener.close()
    os.close(inherited)


def test_the_surroundings_are_unchanged(aftermath):
    _, before, after = aftermath
    assert after == (before, []) and all_gone(os.getpid())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seen, program", [(seen, program) for seen in PROGRAMS for program in PROGRAMS[seen]])
def test_hostile_program(aftermath, way, seen, program):
    result, seconds = aftermath[0][way, program]
    said = result.stdout + result.stderr
    assert "BREACH" not in said and SECRET not in said and "987654321" not in result.stdout, said[:2000]
    assert len(result.stdout) <= 2**20 and len(result.stderr) <= 2**20 and len(result.error or "") <= 510
    assert seconds < 12 and set(result.layers) >= set(WAYS[way]) & ACTIVE
    assert result.success == (seen == ENDS), result
    assert result.timeout == (seen == LATE) or seen in (FAILS, CHEATS), result
    assert result.memory_exceeded or seen != "MemoryError:", result
    assert seen in (ENDS, LATE, FAILS, CHEATS) or re.search(seen, result.error), result


def test_most_of_the_standard_library_works():
    program = """
import asyncio, csv, datetime, decimal, hashlib, json, logging, os, pathlib, random, re, secrets, shutil, signal, sqlite3
import statistics, tempfile, time, typing, unittest, uuid, zlib, zoneinfo
from concurrent.futures import ThreadPoolExecutor
assert asyncio.run(asyncio.sleep(0.001, 7)) == 7
assert list(ThreadPoolExecutor(4).map(abs, range(-3, 0))) == [3, 2, 1]
assert sqlite3.connect(":memory:").execute("select 6 * 7").fetchone() == (42,)
assert len(secrets.token_bytes(8)) == 8 and uuid.uuid4() and hashlib.sha256(b"x").hexdigest()
assert open(os.devnull, "w").write("x") == 1 and open("/dev/urandom", "rb").read(4)
assert os.cpu_count() and os.getcwd() and datetime.datetime.now() and time.localtime()
try:
    signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    time.sleep(1)
except ZeroDivisionError:
    print("woken")
"""
    for layers in WAYS.values():
        result = execute_code(program, timeout=20, layers=layers)
        assert result.success and result.stdout == "woken\n", result


@pytest.mark.parametrize("column, header", [(0, "x86_64-linux-gnu/asm/unistd_64.h"), (1, "asm-generic/unistd.h")])
def test_system_call_numbers_are_those_of_the_kernels_headers(column, header):
    if not (header := Path("/usr/include") / header).exists():
        pytest.skip("no kernel headers here")
    defined = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()))
    if column == 1:
        defined["newfstatat"] = defined["fstatat"]  # its name there
    for name, number in system_calls(column).items():
        assert int(defined[name]) == number, name


def test_an_interrupted_run_leaves_no_process(monkeypatch):
    def interrupt(*_, **__):
        time.sleep(0.3)  # by now the program runs
        assert len(running(os.getpid())) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        execute_code("while True: pass")
    assert all_gone(os.getpid())


@pytest.mark.parametrize("layers", WAYS.values())
def test_a_run_ends_if_the_process_that_started_it_is_killed(layers):
    code = f"from nanochat.execution import execute_code\nexecute_code('while True: pass', 60, layers={layers!r})"
    with subprocess.Popen([sys.executable, "-c", code]) as starter:
        while not any(process.cpu_times().user > 0.1 for process in running(starter.pid)):
            time.sleep(0.02)
        starter.kill()
    assert all_gone(starter.pid)
