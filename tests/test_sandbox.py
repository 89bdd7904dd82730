"""Programs that try to break out, take everything, stay forever, or fake their success. None may.

All programs run once with all layers and once without namespaces; then the surroundings are compared with what they
were. No output may hold the secret that lies in a file, in the environment, in an inherited descriptor and in the
memory of this process.
"""

import os
import platform
import re
import resource
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
from nanochat.sandbox import LAYERS, SYSTEM_CALLS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these layers")

# System calls without a Python function. x86_64 and aarch64, from the kernel's headers.
NUMBERS = """
ptrace:101/117 unshare:272/97 setns:308/268 mount:165/40 umount2:166/39 pivot_root:155/41 bpf:321/280 keyctl:250/219
add_key:248/217 personality:135/92 perf_event_open:298/241 userfaultfd:323/282 io_uring_setup:425/425
memfd_create:319/279 seccomp:317/277 prctl:157/167 capset:126/91 sethostname:170/161 init_module:175/105
kexec_load:246/104 reboot:169/142 syslog:103/116 process_vm_readv:310/270 process_vm_writev:311/271 pidfd_open:434/434
pidfd_getfd:438/438 pidfd_send_signal:424/424 rt_sigqueueinfo:129/138 kcmp:312/272 openat2:437/437 shmget:29/194
msgget:68/186 semget:64/190 mq_open:240/180 open_by_handle_at:304/265 name_to_handle_at:303/264 fanotify_init:300/262
inotify_init1:294/26 clock_settime:227/112 landlock_create_ruleset:444/444 mount_setattr:442/442 open_tree:428/428
fsopen:430/430 move_mount:429/429 execveat:322/281 tgkill:234/131 clone:56/220 clone3:435/435 socket:41/198 swapon:167/224
vmsplice:278/75 quotactl:179/60 acct:163/89 process_madvise:440/440 ioprio_set:251/30 timer_create:222/107 tkill:200/130
fallocate:285/47
"""

PRELUDE = """
import asyncio, concurrent.futures, ctypes, fcntl, gc, mmap, multiprocessing, os, pty, resource, signal, subprocess, sys
import socket, threading, time, urllib.request
from multiprocessing import shared_memory
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def breach(what): print("breach".upper(), what, flush=True)
def each(function, *arguments):
    for argument in arguments:
        try: breach((argument, function(argument)))
        except OSError: pass
    raise OSError
def syscall(name, *args):
    result = libc.syscall(ctypes.c_long(NUMBERS[name]), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if result < 0: raise OSError(ctypes.get_errno(), name)
    return result
def read(path): return open(path, "rb").read(4096)
def shell(command):
    if os.system(command) != 0: raise OSError
def raise_limit(which):
    try: resource.setrlimit(which, (resource.getrlimit(which)[1] + 1,) * 2)
    except ValueError: raise OSError
def raise_all_limits(): each(raise_limit, *[getattr(resource, f"RLIMIT_{n}") for n in ("AS", "CPU", "FSIZE", "NOFILE", "CORE")])
def sleep_in_threads():
    while True: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()
"""

# One attempt per line. Each must raise OSError.
REFUSED = {
    "processes": """
os.fork()
subprocess.run(['/bin/true'])
subprocess.getoutput('id')
shell(f'touch {OUTSIDE}/made')
multiprocessing.Process(target=print).start()
multiprocessing.Pool(2).map(abs, [1])
concurrent.futures.ProcessPoolExecutor(2).submit(abs, 1).result()
os.posix_spawn('/bin/true', ['true'], {})
os.execv('/bin/sh', ['sh', '-c', f'touch {OUTSIDE}/made'])
os.execv(sys.executable, ['python', '-c', 'print(1)'])
each(lambda p: os.execv(p, [p, '/bin/true']), '/lib64/ld-linux-x86-64.so.2', '/lib/ld-linux-aarch64.so.1')
syscall('execveat', 1, b'', 0, 0, 0x1000)
each(lambda flags: syscall('clone', flags, 0, 0, 0, 0), 17, 0x100, 0x4111, 0x10000011, 0x20000011, 0x100d0f00)
syscall('clone3', ctypes.create_string_buffer(88), 88)
pty.fork()
each(lambda call: call(), os.setsid, os.setpgrp, lambda: os.setpgid(0, 0), lambda: os.setpgid(os.getppid(), 0))
syscall('prctl', 1, 0, 0, 0, 0)
syscall('timer_create', 0, 0, 0)
each(lambda pid: each(lambda s: os.kill(pid, s), 0, 15, 9), PARENT, -PARENT, os.getppid(), 2, 0, -1)
each(lambda group: os.killpg(group, 9), os.getpgid(0), 0)
each(lambda pid: syscall('tgkill', pid, pid, 9), PARENT, 2)
syscall('tkill', PARENT, 9)
syscall('rt_sigqueueinfo', PARENT, 9, bytes(128))
syscall('pidfd_send_signal', 1, 9, 0, 0)
each(lambda a: fcntl.fcntl(os.pipe()[0], *a), (8, PARENT), (10, 9), (1024, 0))
each(lambda r: each(lambda pid: syscall('ptrace', r, pid, 0, 0), 0, 1, PARENT, os.getppid()), 0, 16, 0x4206)
each(lambda pid: syscall('process_vm_readv', pid, bytes(16), 1, bytes(16), 1, 0), 1, PARENT, os.getppid())
each(lambda pid: syscall('process_vm_writev', pid, bytes(16), 1, bytes(16), 1, 0), 1, PARENT, os.getppid())
each(lambda pid: syscall('pidfd_open', pid, 0), 1, PARENT)
syscall('pidfd_getfd', 1, 1, 0)
syscall('kcmp', 1, PARENT, 0, 0, 0)
os.setpriority(0, PARENT, 19)
os.nice(-5)
os.sched_setaffinity(PARENT, [0])
os.sched_setscheduler(PARENT, 1, os.sched_param(1))
syscall('ioprio_set', 1, PARENT, 0)
each(lambda pid: resource.prlimit(pid, resource.RLIMIT_NOFILE), 2, PARENT, os.getppid() or PARENT)
resource.prlimit(PARENT, resource.RLIMIT_CPU, (1, 1))
""",
    "memory and limits": """
each(lambda n: syscall(n, b'x', 0), 'memfd_create')
shared_memory.SharedMemory(create=True, size=2**24)
syscall('shmget', 0, 2**24, 0o1666)
syscall('msgget', 0, 0o1666)
syscall('semget', 0, 1, 0o1666)
syscall('mq_open', b'/x', 0o102, 0o666, 0)
fcntl.fcntl(os.pipe()[0], 1031, 2**20)
each(lambda mode: syscall('fallocate', 1, mode, 0, 2**30), 0, 1)
raise_all_limits()
""",
    "files": """
each(read, '/etc/passwd', '/etc/shadow', '/etc/hostname', '/etc/hosts', PROJECT + '/nanochat/gpt.py', KEY)
each(os.listdir, '/', '/etc', '/root', '/home', '/usr', '/var', '/proc', '/sys', '/dev', PROJECT, OUTSIDE, '../' * 40)
os.scandir(OUTSIDE)
read('../' * 40 + KEY)
(os.symlink(OUTSIDE, 'l'), read('l/.ssh/id_rsa'))
(os.symlink('/', 'r'), os.listdir('r'))
(os.link(KEY, 'h'), read('h'))
each(lambda fd: os.open('etc/passwd', 0, dir_fd=fd), *range(64))
(os.chdir(OUTSIDE), read('.ssh/id_rsa'))
syscall('openat2', -100, KEY.encode(), ctypes.create_string_buffer(24), 24)
syscall('name_to_handle_at', -100, b'/', 0, 0, 0)
syscall('open_by_handle_at', 0, 0, 0)
each(os.fstat, *range(5, 1024))
each(lambda pid: each(lambda f: read(f'/proc/{pid}/{f}'), 'environ', 'maps', 'mem', 'root/etc/passwd'), 'self', 1, PARENT)
each(os.listdir, '/proc/self/fd', '/dev/fd', f'/proc/{PARENT}/fd')
each(lambda fd: read(f'/proc/self/fd/{fd}'), 1, 2, *range(5, 64))
each(read, '/dev/mem', '/dev/kmsg', '/dev/tty', '/dev/ptmx', '/dev/vda', '/dev/sda', '/dev/shm/x', '/dev/fuse')
each(lambda device: os.mknod('d', *device), (0o20666, os.makedev(1, 1)), (0o60666, os.makedev(254, 0)))
each(lambda path: open(path, 'w'), OUTSIDE + '/made', '/dev/shm/x', '/made', LIBRARY + '/evil.py')
each(lambda path: each(lambda mode: open(path, mode), 'a', 'r+'), CANARY, os.__file__)
each(os.mkdir, OUTSIDE + '/made', LIBRARY + '/evil', '/made')
os.open(OUTSIDE, os.O_TMPFILE | os.O_RDWR)
os.mkfifo(OUTSIDE + '/made')
os.symlink('x', OUTSIDE + '/made')
os.link(CANARY, OUTSIDE + '/made')
each(lambda paths: os.rename(*paths), (CANARY, 'made'), ('.', OUTSIDE + '/made'), (os.__file__, LIBRARY + '/os2.py'))
each(lambda path: os.rename(path, path + '2'), CANARY, '/tmp', '/lib')
each(os.remove, CANARY, '/etc/passwd', os.__file__)
each(os.rmdir, OUTSIDE + '/empty', '/lib')
each(lambda path: os.truncate(path, 0), CANARY, os.__file__)
each(lambda path: os.open(path, os.O_TRUNC), CANARY, os.__file__)
each(lambda path: os.chmod(path, 0o777), OUTSIDE, CANARY, os.__file__)
each(lambda path: os.utime(path, (0, 0)), CANARY, os.__file__)
os.chown(CANARY, 1, 1)
os.setxattr(CANARY, 'user.x', b'x')
each(os.chroot, '/', '.')
syscall('pivot_root', b'.', b'.')
syscall('mount', b'none', b'.', b'tmpfs', 0, 0)
syscall('mount', 0, b'/', 0, 4128, 0)
syscall('umount2', b'/tmp', 2)
syscall('fsopen', b'proc', 0)
syscall('open_tree', -100, b'/', 1)
syscall('mount_setattr', -100, b'/', 0x8000, bytes(32), 32)
syscall('move_mount', 1, b'', 1, b'', 0)
""",
    "network": """
each(lambda host: socket.create_connection((host, PORT), 1), '127.0.0.1', '::1')
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))
socket.getaddrinfo('example.com', 80)
urllib.request.urlopen(f'http://127.0.0.1:{PORT}', timeout=1)
asyncio.run(asyncio.open_connection('127.0.0.1', PORT))
each(socket.socket(socket.AF_UNIX).connect, OUTSIDE + '/socket', ABSTRACT)
each(lambda kind: socket.socketpair(socket.AF_UNIX, kind)[0].sendto(b'x', ABSTRACT), 1, 2)
socket.create_server(('127.0.0.1', 0))
socket.socket(socket.AF_UNIX).bind('s')
each(lambda family: each(lambda kind: syscall('socket', family, kind, 0), 1, 2, 3), *range(46))
""",
    "kernel": """
os.setuid(0)
os.setresuid(1, 1, 1)
os.setgroups([0])
os.setgid(0)
syscall('capset', bytes(8), bytes(24))
each(lambda flag: syscall('unshare', flag), 0x10000000, 0x20000, 0x40000000, 0x400)
syscall('setns', 1, 0)
syscall('personality', 0x0040000)
syscall('prctl', 4, 1, 0, 0, 0)
syscall('sethostname', b'x', 1)
each(lambda n: syscall(n, 0, 0, 0, 0, 0), 'bpf', 'keyctl', 'add_key', 'perf_event_open', 'userfaultfd', 'io_uring_setup')
each(lambda n: syscall(n, 0, 0, 0, 0, 0), 'seccomp', 'init_module', 'kexec_load', 'reboot', 'syslog', 'fanotify_init')
each(lambda n: syscall(n, 0, 0, 0, 0, 0), 'inotify_init1', 'clock_settime', 'swapon', 'quotactl', 'acct', 'vmsplice')
each(lambda n: syscall(n, 0, 0, 0, 0, 0), 'process_madvise', 'landlock_create_ruleset')
""",
}

# What must be seen -> programs.
ENDS, LATE, FAILS, EITHER = "it ends", "it times out", "it fails", "it ends or fails"
FULL = "File too large|No space left|Permission denied"
PROGRAMS = {
    LATE: [
        "while True: pass",
        "while True:\n    try: os.fork()\n    except OSError: pass",
        "threading.Thread(target=time.sleep, args=(99,)).start()",
        "def f():\n    while True: __import__('hashlib').sha256(bytes(2**20))\nfor _ in range(8): threading.Thread(target=f).start()",
        "import re; re.match('(a+)+$', 'a' * 99 + 'b')",
        "x = 3 ** 10**9",
        "time.sleep(99)",
        "lock = threading.Lock(); lock.acquire(); lock.acquire()",
        "os.read(3, 1)",
        "for s in signal.valid_signals():\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\nwhile True: pass",
        "signal.pthread_sigmask(0, signal.valid_signals()); time.sleep(99)",
        "import atexit; atexit.register(time.sleep, 99)",
        "class A:\n    def __del__(self, sleep=time.sleep): sleep(99)\na = A()",
        "os.closerange(0, 256); time.sleep(99)",
        "os.closerange(0, 3)\nwhile True: pass",
        "signal.signal(14, lambda *_: None); signal.setitimer(0, 1e-5, 1e-5)\nwhile True: pass",
        "sys.settrace(lambda *_: time.sleep(99))\n(lambda: 0)()",
        "x = []\ntry:\n    while True: x.append(bytearray(2**20))\nexcept MemoryError: pass\ntime.sleep(99)",
    ],
    "MemoryError:": [
        "x = []\nwhile True: x.append([])",
        "x = bytearray(10**9)",
        "x = 'x' * 10**12",
        "x = {}\nwhile True: x[len(x)] = str(len(x))",
        "x = 1 << 10**10",
        "x = [0]\nwhile True: x += x",
    ],
    "Cannot allocate memory|MemoryError": [
        "x = [mmap.mmap(-1, 2**24) for _ in range(99)]",
        "x = [mmap.mmap(-1, 2**24, mmap.MAP_SHARED) for _ in range(99)]",
    ],
    "Cannot allocate memory|Permission denied": [
        "f = open('f', 'wb+'); f.truncate(2**24 - 1); x = [mmap.mmap(f.fileno(), 0) for _ in range(99)]",
    ],
    "can't start new thread|MemoryError": ["sleep_in_threads()", "threading.stack_size(2**26)\nsleep_in_threads()"],
    "RecursionError": ["def f(): f()\nf()"],
    FULL: [
        "f = open('f', 'wb')\nwhile True: f.write(bytes(2**20))",
        "for i in range(10**6): open(str(i), 'wb').write(bytes(2**20))",
        "for i in range(10**6): open(str(i), 'wb').close()",
        "while True: os.mkdir('d'); os.chdir('d')",
        "open('f', 'wb').truncate(2**40)",
        "f = open('f', 'wb'); os.posix_fallocate(f.fileno(), 0, 2**40)",
        "open('f', 'w').close()\nfor i in range(10**6): os.link('f', str(i))",
        "for i in range(10**6): os.symlink('f' * 200, str(i))",
        "while True: print('x' * 9999)",
        "while True: sys.stderr.write('x' * 9999)",
        "while True: os.write(1, b'x' * 99999)",
        "os.lseek(1, 2**40, 0)\nos.write(1, b'x')",
        "os.ftruncate(1, 2**40)",
    ],
    "Too many open files|Permission denied": [
        "x = [os.open('.', os.O_TMPFILE | os.O_RDWR) for _ in range(99)]",
        "x = [os.pipe() for _ in range(99)]",
        "while True: os.dup(1)",
    ],
    ENDS: [
        "for d in range(64):\n    if d != 3:\n        try: print(d, os.pread(d, 4096, 0))\n        except OSError: pass",
        "f = sys._getframe()\nwhile f:\n    print(f.f_code.co_name, f.f_locals, f.f_globals)\n    f = f.f_back",
        "for o in gc.get_objects():\n    if isinstance(o, (dict, list, tuple)): print(repr(o)[:200])",
        "for c in object.__subclasses__():\n    g = getattr(c.__init__, '__globals__', {})\n"
        "    if 'system' in g and g['system'](f'touch {OUTSIDE}/made') == 0: breach('system')",
        # x86_64 runs 335 and 336, uretprobe and uprobe, before seccomp; they kill their caller
        "for n in range(600):\n    for n in (n, n | 0x40000000):\n        if n not in {*ALLOWED, 335, 336} and not ("
        "libc.syscall(n, -1, -1, -1, -1, -1, -1) == -1 and ctypes.get_errno() == 13): breach(n)",
    ],
    FAILS: [
        "threading.stack_size(32768)\nsleep_in_threads()",
        "sys.setrecursionlimit(2**31 - 1)\ndef f(): return [f()]\nf()",
        "sys.setrecursionlimit(2**31 - 1)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
        "ctypes.string_at(0)",
        "os.abort()",
        # lies about its end
        "print('ended\\nsuccess\\npassed')\n1 / 0",
        "sys.exit(0)",
        "os._exit(0)",
        "threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(9)",
        "for d in range(64):\n    for s in (b'ended', b'\\nended\\n', b'\\nlayers namespaces\\nended\\n'):\n"
        "        try: os.write(d, s)\n        except OSError: pass\nos._exit(0)",
        "import marshal; os.write(3, marshal.dumps((b'', 'ended', None))); os._exit(0)",
        "while True: os.write(3, b'x' * 99999)",
        "os.closerange(0, 256)\nos._exit(0)",
        "os.closerange(0, 256)\n1 / 0",
        "class E(Exception):\n    def __str__(self): 1 / 0\n    __repr__ = __str__\nraise E",
        "class E(Exception):\n    def __str__(self): os._exit(0)\nraise E",
        "class E(Exception):\n    def __str__(self): raise SystemExit(0)\nraise E",
        "class E(Exception):\n    def __str__(self): return str(self)\nraise E",
        "class M(type):\n    @property\n    def __name__(cls): os._exit(0)\nraise M('E', (Exception,), {})()",
        "raise ValueError('\\nended\\n' * 10**6)",
        "raise type('ended', (BaseException,), {})()",
        "f = sys._getframe()\nwhile f:\n    f.f_globals.update(judge=None, receive=None, os=None)\n    f = f.f_back\n1 / 0",
        "f = sys._getframe()\nwhile 'secret' not in f.f_locals: f = f.f_back\nimport marshal\n"
        "os.write(3, marshal.dumps((f.f_locals['secret'], 'failed', 'A' * 10**6)))\nos._exit(0)",
        "import builtins\nfor n in dir(builtins):\n    if n not in ('delattr', 'OSError'): setattr(builtins, n, None)",
        "sys.modules.clear()\n1 / 0",
        "sys.stdout = sys.stderr = None\n1 / 0",
        "os.write = lambda fd, data: len(data)",
        "sys.excepthook = sys.__excepthook__ = lambda *_: os._exit(0)\n1 / 0",
        "import atexit; atexit.register(os._exit, 7)",
    ],
    EITHER: ["for n in list(sys.modules): sys.modules[n] = None"],
}  # fmt: skip
if platform.machine() == "x86_64":  # mov eax, 20 (getpid of 32 bits); int 0x80; ret
    PROGRAMS["killed by signal (31|11)"] = [
        "m = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes.fromhex('b814000000cd80c3'))\n"
        "breach(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))())"
    ]
ATTEMPTS = "for line in {!r}.strip().splitlines():\n    try: breach((line, eval(line)))\n    except OSError: pass"
PROGRAMS[ENDS] += [ATTEMPTS.format(lines) for lines in REFUSED.values()]
WAYS = {"all layers": LAYERS, "without namespaces": LAYERS[1:]}

# Programs that pretend to add a number which only the tests know.
TESTS = """
import random
from program import f
for _ in range(4):
    x = random.randrange(10**9)
    assert f(x) == x + 987654321
"""
ANYTHING = "class A({}):\n    __eq__ = __ne__ = lambda *_: True\n    __hash__ = lambda s: 0\n    {}\ndef f(x): return A()"
CHEATS = [
    ANYTHING.format("object", "pass"),
    ANYTHING.format("int", "pass"),
    ANYTHING.format("dict", "pass"),
    ANYTHING.format("object", "__class__ = int\n    __int__ = __index__ = lambda s: 0"),
    "def f(x): pass",
    "g = 1",
    "f = 1",
    "def f(x): return float('nan')",
    "def f(x): return lambda: 0",
    "def f(x): raise StopIteration",
    "def f(x): sys.exit(0)",
    "def f(x): os._exit(0)",
    "def f(x): os.kill(os.getppid(), 9)",
    "def f(x): os.closerange(3, 64)",
    "def f(x):\n    while True: pass",
    "def f(x):\n    y = []\n    while True: y.append([])",
    "def f(x): return open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "def f(x): return 'x' * 10**7",
    "x = []\nx.append(x)\ndef f(_): return x",
    "import builtins\nbuiltins.AssertionError = Warning\nbuiltins.int = str\ndef f(x): return 0",
    "import unittest\nunittest.TestCase.run = unittest.TestCase.assertEqual = lambda *_: None\ndef f(x): return 0",
    "import random\nrandom.randrange = lambda *_: 0\ndef f(x): return 987654321 if x == 0 else 0",
    "for module in list(sys.modules.values()): vars(module).update(f=lambda x: 0, x=0)\ndef f(x): return 0",
    "import re\ndef f(x):\n    for o in gc.get_objects():\n"
    "        if found := re.search(r'== x \\+ (\\d+)', repr(o)[:10**6]): return x + int(found[1])",
    "def f(x):\n    for d in range(64):\n        if d != 3:\n            try: print(os.pread(d, 10**6, 0))\n"
    "            except OSError: pass\n    return 0",
    # speaks the protocol
    "import marshal\nf = sys._getframe()\nwhile 'secret' not in f.f_locals: f = f.f_back\nsecret = f.f_locals['secret']\n"
    "for kind in ('ended', 'ended', 'value', 'failed', 'raised'): os.write(3, marshal.dumps((secret, kind, '')))\nos._exit(0)",
    "import threading\ndef flood():\n    while True: os.write(3, b'x')\n"
    "threading.Thread(target=flood, daemon=True).start()\ndef f(x): return 0",
    "import marshal\nmarshal.dumps = lambda message: b'['\ndef f(x): return 0",
    "import marshal\nmarshal.dumps = lambda message: b'[\\xff\\xff\\xff\\x7f'\ndef f(x): return 0",
    "def f(x): raise type('eval', (Exception,), {})('open(\"/tmp/made\", \"w\")')",
]
CASES = [(seen, program) for seen, programs in PROGRAMS.items() for program in programs]
CASES += [("cheat", f"import gc, os, sys\n{program}") for program in CHEATS]


def world(folder):
    """What must be the same afterwards."""
    library, me = Path(os.__file__), psutil.Process()
    states = [(str(p), p.lstat()) for p in [folder, *folder.rglob("*"), library, library.parent]]
    entries = [(path, s.st_mode, s.st_uid, s.st_mtime_ns, s.st_size) for path, s in states]
    texts = [p.read_bytes() for p in [*sorted(folder.rglob("*")), library] if p.is_file()]
    limits = [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE)]
    return entries, texts, limits, os.nice(0), os.sched_getaffinity(0), me.children(), me.num_fds()


def running(parent=None):
    """Processes of sandboxes that this process, or `parent`, has started; also those that init has adopted."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or ()
        if SANDBOX in command and command[-1] == str(parent or os.getpid()) and process.info["status"] != "zombie":
            found.append(process)
    return found


def all_gone(parent=None):
    deadline = time.monotonic() + 5
    while running(parent) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not running(parent)


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory):
    """Runs all programs. {(way, program): (result, seconds)}, the surroundings before and after, sockets, the secret."""
    secret, patch = os.urandom(16).hex(), pytest.MonkeyPatch()
    folder, scratch = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("scratch")
    (folder / ".ssh").mkdir()
    (folder / "empty").mkdir()
    for name in (".ssh/id_rsa", "canary"):
        (folder / name).write_text(secret)
    patch.setenv("API_KEY", secret)
    patch.setattr(tempfile, "tempdir", str(scratch))
    inherited = os.open(folder / ".ssh/id_rsa", os.O_RDWR)
    os.set_inheritable(inherited, True)
    tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    port, abstract = tcp.getsockname()[1], f"\0nanochat-{os.getpid()}".encode()
    udp.bind(("127.0.0.1", port))
    listeners = [tcp, socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    for listener, address in zip(listeners[1:], (str(folder / "socket"), abstract)):
        listener.bind(address)
        listener.listen()
    column = {"x86_64": 0, "aarch64": 1}[platform.machine()]
    numbers = {name: int(n) for name, n in system_calls(SYSTEM_CALLS + NUMBERS, column).items()}
    values = {"OUTSIDE": str(folder), "KEY": str(folder / ".ssh/id_rsa"), "CANARY": str(folder / "canary"), "PORT": port,
              "PROJECT": str(Path(SANDBOX).parent.parent), "LIBRARY": os.path.dirname(os.__file__), "PARENT": os.getpid(),
              "ABSTRACT": abstract, "NUMBERS": numbers, "ALLOWED": [*map(int, system_calls(SYSTEM_CALLS, column).values())]}  # fmt: skip
    prelude = PRELUDE + "".join(f"{key} = {value!r}\n" for key, value in values.items())

    def run(case):
        way, seen, program = case
        started = time.monotonic()
        code, tests = (program, TESTS) if seen == "cheat" else (prelude + program, None)
        result = execute_code(code, timeout=2 if seen in (LATE, "cheat") else 8, tests=tests, layers=WAYS[way])
        return (way, program), (result, time.monotonic() - started)

    before = world(folder)
    with ThreadPoolExecutor(6) as pool:
        results = dict(pool.map(run, [(way, *case) for way in WAYS for case in CASES]))
    patch.undo()
    yield results, before, (world(folder), os.listdir(scratch)), (listeners, udp), secret
    for opened in (*listeners, udp):
        opened.close()
    os.close(inherited)


def system_calls(table, column):
    pairs = [entry.partition(":")[::2] for entry in table.split()]
    return {name: both.split("/")[column] for name, both in pairs if both.split("/")[column] != "-"}


def test_the_surroundings_are_unchanged(aftermath):
    _, before, after, (listeners, udp), _ = aftermath
    assert after == (before, []) and all_gone()
    for listener in listeners:
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    udp.setblocking(False)
    with pytest.raises(BlockingIOError):
        udp.recv(1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seen, program", CASES)
def test_hostile_program(aftermath, way, seen, program):
    (result, seconds), secret = aftermath[0][way, program], aftermath[4]
    said = result.stdout + result.stderr
    assert "BREACH" not in said and secret not in said and "987654321" not in result.stdout, said[:2000]
    assert len(result.stdout) <= 2**20 and len(result.stderr) <= 2**20 and len(result.error or "") <= 510
    assert seconds < 12 and set(result.layers) >= set(WAYS[way]) & set(execute_code("").layers)
    if seen != EITHER:
        assert result.success == (seen == ENDS), result
    assert result.timeout == (seen == LATE) or seen in (FAILS, "cheat"), result
    assert result.memory_exceeded or seen != "MemoryError:", result
    if seen not in (ENDS, LATE, FAILS, EITHER, "cheat"):
        assert re.search(seen, result.error), result


def test_tests_fail_if_the_program_ends_in_a_call_whose_exceptions_they_handle():
    tests = "from program import f\ntry: f(1)\nexcept Exception: pass\nelse: raise SystemExit"
    assert execute_code("def f(x): return 1 / 0", tests=tests).success
    for body in ("os._exit(0)", "os.close(3)", "os.write(3, b'x')"):
        assert not execute_code(f"import os\ndef f(x): {body}", tests=tests, timeout=2).success


def test_no_descriptor_is_inherited_from_a_parent_with_many():
    opened = [os.dup(1) for _ in range(600)]
    try:
        program = "import os\nfor fd in range(5, 2000):\n    try: print(fd, os.fstat(fd))\n    except OSError: pass"
        for layers in WAYS.values():
            result = execute_code(program, layers=layers)
            assert result.success and result.stdout == "", result
    finally:
        for fd in opened:
            os.close(fd)


def test_most_of_the_standard_library_works():
    program = """
import asyncio, collections, csv, datetime, decimal, enum, fractions, functools, hashlib, heapq, io, itertools, json
import logging, math, os, pathlib, pickle, random, re, secrets, shutil, sqlite3, statistics, sys, tempfile, textwrap
import signal, threading, time, typing, unittest, uuid, zlib, zoneinfo
from concurrent.futures import ThreadPoolExecutor

async def three():
    return await asyncio.gather(*[asyncio.sleep(0.001, number) for number in range(3)])

assert asyncio.run(three()) == [0, 1, 2]
assert list(ThreadPoolExecutor(4).map(abs, range(-3, 0))) == [3, 2, 1]
assert sqlite3.connect(":memory:").execute("select 6 * 7").fetchone() == (42,)
assert len(secrets.token_bytes(8)) == 8 and uuid.uuid4() and hashlib.sha256(b"x").hexdigest()
assert open(os.devnull, "w").write("x") == 1 and open("/dev/urandom", "rb").read(4)
assert not sys.stdout.isatty() and os.cpu_count() and os.getcwd() and datetime.datetime.now() and time.localtime()
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
    for name, number in system_calls(SYSTEM_CALLS + NUMBERS, column).items():
        assert defined[name] == number, name


def test_an_interrupted_run_leaves_no_process(monkeypatch):
    def interrupt(*_, **__):
        time.sleep(0.3)  # by now the program runs
        assert len(running()) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        execute_code("while True: pass")
    assert all_gone()


@pytest.mark.parametrize("layers", WAYS.values())
def test_a_run_ends_if_the_process_that_started_it_is_killed(layers):
    code = f"from nanochat.execution import execute_code\nexecute_code('while True: pass', 60, layers={layers!r})"
    with subprocess.Popen([sys.executable, "-c", code]) as starter:
        while not any(process.cpu_times().user > 0.1 for process in running(starter.pid)):
            time.sleep(0.02)
        starter.kill()
    assert all_gone(starter.pid)
