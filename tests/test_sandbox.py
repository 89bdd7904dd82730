"""Programs that try to break out, take everything, stay forever, or lie about themselves. None may.

One table, (name, program, what must be seen). All programs run once with all layers and once without
namespaces, side by side, before the first test looks; then the world around them is compared with what
it was. A program calls `never(...)` with what must be refused: it prints BREACH where that works, and
anything but an OSError is a failure. No output may hold the secret that lies in a file, in the
environment, in an inherited descriptor and in the memory of this process.
"""

import json
import os
import platform
import re
import resource
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from nanochat.execution import BOOT, execute_code, execute_tests, has_namespaces
from nanochat.sandbox import LAYERS, SYSTEM_CALLS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these layers")

ENDS = "it ends as if nothing had happened"
LATE = "it runs into its time limit"
MEMORY = "it wants too much memory"
ANY = "it fails in one way or another"
EITHER = "it may fail or not"
DENIED = r"PermissionError|FileNotFoundError|BlockingIOError"
FULL = r"File too large|No space left|Permission denied"

# x86_64 and aarch64, from the kernel's headers: what is tried by number because Python has no function for it
NUMBERS = """
ptrace:101/117 unshare:272/97 setns:308/268 mount:165/40 umount2:166/39 pivot_root:155/41 chroot:161/51 bpf:321/280
keyctl:250/219 add_key:248/217 personality:135/92 perf_event_open:298/241 userfaultfd:323/282 io_uring_setup:425/425
memfd_create:319/279 seccomp:317/277 prctl:157/167 setuid:105/146 capset:126/91 sethostname:170/161 init_module:175/105
kexec_load:246/104 reboot:169/142 syslog:103/116 process_vm_readv:310/270 process_vm_writev:311/271 pidfd_open:434/434
pidfd_getfd:438/438 pidfd_send_signal:424/424 rt_sigqueueinfo:129/138 kcmp:312/272 openat2:437/437 shmget:29/194
msgget:68/186 semget:64/190 mq_open:240/180 open_by_handle_at:304/265 name_to_handle_at:303/264 fanotify_init:300/262
inotify_init1:294/26 clock_settime:227/112 landlock_create_ruleset:444/444 mount_setattr:442/442 open_tree:428/428
fsopen:430/430 move_mount:429/429 execveat:322/281 tgkill:234/131 clone:56/220 clone3:435/435 socket:41/198 swapon:167/224
vmsplice:278/75 quotactl:179/60 acct:163/89 process_madvise:440/440 ioprio_set:251/30 timer_create:222/107 tkill:200/130
fallocate:285/47
"""

PRELUDE = """
import os, sys
def breach(what): print("breach".upper(), what, flush=True)
def never(*attempts):
    for number, attempt in enumerate(attempts):
        try: value = attempt()
        except OSError: continue
        breach(f"attempt {number} gave {value!r:.200}")
def syscall(name, *args):
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result = libc.syscall(ctypes.c_long(NUMBERS[name]), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if result < 0: raise OSError(ctypes.get_errno(), name)
    return result
def read(path): return open(path, "rb").read(4096)
"""

PROCESSES = [
    ("fork", "os.fork()", DENIED),
    ("fork bomb", "while True:\n    os.fork()", DENIED),
    ("fork bomb that does not mind", "while True:\n    try: os.fork()\n    except OSError: pass", LATE),
    ("subprocess", "import subprocess; subprocess.run(['/bin/true'])", DENIED),
    ("a shell", "if os.system(f'touch {OUTSIDE}/made') == 0: breach('shell')", ENDS),
    ("popen", "import subprocess; print(subprocess.getoutput('id'))", DENIED),
    ("multiprocessing", "import multiprocessing as m; m.Process(target=print).start()", DENIED),
    ("a pool of processes", "import multiprocessing as m; m.Pool(2).map(abs, [1])", DENIED),
    ("process pool executor", "from concurrent.futures import *; ProcessPoolExecutor(2).submit(abs, 1).result()", DENIED),
    ("posix_spawn", "os.posix_spawn('/bin/true', ['true'], {})", DENIED),
    ("exec a shell", "os.execv('/bin/sh', ['sh', '-c', f'touch {OUTSIDE}/made'])", DENIED),
    ("exec an interpreter", "os.execv(sys.executable, ['python', '-c', 'print(1)'])", DENIED),
    ("exec the linker", "never(*[lambda p=p: os.execv(p, [p, '/bin/true']) for p in "
     "('/lib64/ld-linux-x86-64.so.2', '/lib/ld-linux-aarch64.so.1')], lambda: syscall('execveat', 1, b'', 0, 0, "
     "0x1000))", ENDS),
    ("clone by number", "never(*[lambda f=f: syscall('clone', f, 0, 0, 0, 0) for f in (17, 0x100, 0x4111, 0x10000011, "
     "0x20000011)])", ENDS),
    ("clone a thread into a namespace", "never(lambda: syscall('clone', 0x100d0f00, 0, 0, 0, 0))", ENDS),
    ("clone3", "import ctypes; never(lambda: syscall('clone3', ctypes.create_string_buffer(88), 88))", ENDS),
    ("a terminal", "import pty; pty.fork()", r"OSError|PermissionError|FileNotFoundError"),
    ("daemon", "if os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\nimport time; time.sleep(99)", DENIED),
    ("a session of its own", "never(os.setsid, os.setpgrp, lambda: os.setpgid(0, 0), lambda: os.setpgid(os.getppid(), "
     "0))", ENDS),
    ("outlive the parent", "never(lambda: syscall('prctl', 1, 0, 0, 0, 0))", ENDS),
    ("thread bomb", "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
     "RuntimeError: can't start new thread|MemoryError"),
    ("thread bomb of small stacks", "import threading, time\nthreading.stack_size(32768)\n"
     "while True: threading.Thread(target=time.sleep, args=(99,), daemon=True).start()", ANY),
    ("a thread that never ends", "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()", LATE),
    ("timers by the thousand", "never(lambda: syscall('timer_create', 0, 0, 0))", ENDS),
]

TOO_MUCH = [
    ("list", "x = []\nwhile True: x.append([])", MEMORY),
    ("bytearray", "x = bytearray(10**9)", MEMORY),
    ("string", "x = 'x' * 10**12", MEMORY),
    ("dict", "x = {}\nwhile True: x[len(x)] = str(len(x))", MEMORY),
    ("large integer", "x = 1 << 10**10", MEMORY),
    ("doubling", "x = [0]\nwhile True: x += x", MEMORY),
    ("mmap", "import mmap; x = [mmap.mmap(-1, 2**24) for _ in range(99)]", "Cannot allocate memory|MemoryError"),
    ("mmap shared", "import mmap; x = [mmap.mmap(-1, 2**24, "
     "mmap.MAP_SHARED) for _ in range(99)]", "Cannot allocate memory|MemoryError"),
    ("mmap of a file", "import mmap; f = open('f', 'wb+'); f.truncate(2**24 - 1); x = [mmap.mmap(f.fileno(), "
     "0) for _ in range(99)]",
     "Cannot allocate memory|Permission denied"),
    ("memory files", "never(lambda: os.memfd_create('x'), lambda: syscall('memfd_create', b'x', 0))", ENDS),
    ("shared memory", "from multiprocessing import shared_memory as s; s.SharedMemory(create=True, size=2**24)", r"Error"),
    ("system V memory", "never(lambda: syscall('shmget', 0, 2**24, 0o1666), lambda: syscall('msgget', 0, 0o1666), "
     "lambda: syscall('semget', 0, 1, 0o1666), lambda: syscall('mq_open', b'/x', 0o102, 0o666, 0))", ENDS),
    ("stacks", "import threading, time\nthreading.stack_size(2**26)\n"
     "for _ in range(99): threading.Thread(target=time.sleep, args=(99,), daemon=True).start()", "can't start new thread"),
    ("recursion", "def f(): f()\nf()", "RecursionError"),
    ("recursion without a limit", "sys.setrecursionlimit(2**31 - 1)\ndef f(): return [f()]\nf()", ANY),
    ("recursion in C", "sys.setrecursionlimit(2**31 - 1)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)", ANY),
    ("hold the memory and sleep", "x = []\ntry:\n    while True: x.append(bytearray(2**20))\n"
     "except MemoryError: pass\nimport time; time.sleep(99)", LATE),
    ("raise the limits", "import resource\nfor name in dir(resource):\n    if name.startswith('RLIMIT_'):\n"
     "        which = getattr(resource, name)\n        hard = resource.getrlimit(which)[1]\n"
     "        if name in ('RLIMIT_AS', 'RLIMIT_CPU', 'RLIMIT_FSIZE', 'RLIMIT_NOFILE', 'RLIMIT_CORE'):\n"
     "            try: resource.setrlimit(which, (hard + 1, hard + 1))\n            except (ValueError, OSError): continue\n"
     "            breach(name)", ENDS),
    ("one large file", "f = open('f', 'wb')\nwhile True: f.write(bytes(2**20))", FULL),
    ("many files", "for i in range(10**6): open(str(i), 'wb').write(bytes(2**20))", FULL),
    ("empty files", "for i in range(10**6): open(str(i), 'wb').close()", FULL),
    ("folders", "for i in range(10**6): os.mkdir(str(i))", FULL),
    ("deep folders", "while True: os.mkdir('d'); os.chdir('d')", FULL),
    ("sparse file", "open('f', 'wb').truncate(2**40)", FULL),
    ("allocated file", "f = open('f', 'wb'); os.posix_fallocate(f.fileno(), 0, 2**40)", FULL),
    ("hard links", "open('f', 'w').close()\nfor i in range(10**6): os.link('f', str(i))", FULL),
    ("symbolic links", "for i in range(10**6): os.symlink('f' * 200, str(i))", FULL),
    ("unnamed files", "x = [os.open('.', os.O_TMPFILE | os.O_RDWR) for _ in range(99)]", "Too many open files|Permission denied"),
    ("descriptors", "x = [os.pipe() for _ in range(99)]", "Too many open files"),
    ("copies of descriptors", "while True: os.dup(1)", "Too many open files"),
    ("large pipes", "import fcntl; never(lambda: fcntl.fcntl(os.pipe()[0], 1031, 2**20))", ENDS),
    ("flood of output", "while True: print('x' * 9999)", "File too large"),
    ("flood of errors", "while True: sys.stderr.write('x' * 9999)", "File too large"),
    ("flood below Python", "while True: os.write(1, b'x' * 99999)", "File too large"),
    ("output with a hole", "os.lseek(1, 2**40, 0)\nos.write(1, b'x')", "File too large"),
    ("space behind the output", "never(lambda: syscall('fallocate', 1, 1, 0, 2**30), "
     "lambda: syscall('fallocate', 2, 0, 0, 2**24))", ENDS),
    ("stretched output", "os.ftruncate(1, 2**40)", "File too large"),
]

TOO_LONG = [
    ("loop", "while True: pass", LATE),
    ("loops on all cores", "import threading, hashlib\ndef f():\n    while True: hashlib.sha256(bytes(2**20))\n"
     "for _ in range(8): threading.Thread(target=f).start()", LATE),
    ("regular expression", "import re; re.match('(a+)+$', 'a' * 99 + 'b')", LATE),
    ("power", "x = 3 ** 10**9", LATE),
    ("loop in C", "import itertools, collections; collections.deque(itertools.repeat(0), 0)", LATE),
    ("sleep", "import time; time.sleep(99)", LATE),
    ("deadlock", "import threading; l = threading.Lock(); l.acquire(); l.acquire()", LATE),
    ("wait for a pipe", "os.read(os.pipe()[0], 1)", LATE),
    ("wait for the runner", "os.read(3, 1)", LATE),
    ("select", "import select; select.select([], [], [])", LATE),
    ("ignore every signal", "import signal\nfor s in signal.valid_signals():\n    try: signal.signal(s, signal.SIG_IGN)\n"
     "    except OSError: pass\nwhile True: pass", LATE),
    ("ignore SIGTERM and sleep", "import signal, time\nfor s in (2, 14, 15): signal.signal(s, lambda *_: None)\n"
     "while True: time.sleep(9)", LATE),
    ("block every signal", "import signal, time; signal.pthread_sigmask(0, signal.valid_signals()); time.sleep(99)", LATE),
    ("stop", "os.kill(os.getpid(), 19)", LATE),
    ("sleep at exit", "import atexit, time; atexit.register(time.sleep, 99)", LATE),
    ("sleep in a destructor", "class A:\n    def __del__(self, sleep=__import__('time').sleep): sleep(99)\na = A()", LATE),
    ("close everything and sleep", "import time; os.closerange(0, 256); time.sleep(99)", ANY),
    ("close the channel and sleep", "import time; os.close(4); time.sleep(99)", ANY),
    ("close the output and loop", "os.closerange(0, 3)\nwhile True: pass", LATE),
    ("alarms", "import signal; signal.signal(14, lambda *_: None); signal.setitimer(0, 1e-5, 1e-5)\nwhile True: pass", LATE),
    ("hostile trace", "sys.settrace(lambda *_: __import__('time').sleep(99))\n(lambda: 0)()", LATE),
]

FILES = [
    ("accounts", "never(*[lambda p=p: read(p) for p in ('/etc/passwd', '/etc/shadow', '/etc/hostname', '/etc/hosts')])", ENDS),
    ("keys", "never(lambda: read(OUTSIDE + '/.ssh/id_rsa'), lambda: os.listdir(OUTSIDE), lambda: os.scandir(OUTSIDE))", ENDS),
    ("the project", "never(lambda: read(PROJECT + '/nanochat/gpt.py'), lambda: os.listdir(PROJECT))", ENDS),
    ("folders of the machine", "never(*[lambda p=p: os.listdir(p) for p in ('/', '/etc', '/root', '/home', '/usr', "
     "'/var', '/proc', '/sys')])", ENDS),
    ("by way of dots", "never(lambda: read('../' * 40 + OUTSIDE + '/.ssh/id_rsa'), lambda: os.listdir('../' * 40))", ENDS),
    ("by way of a link", "never(lambda: (os.symlink(OUTSIDE, 'l'), read('l/.ssh/id_rsa')), lambda: (os.symlink('/', 'r'), "
     "os.listdir('r')), "
     "lambda: (os.link(OUTSIDE + '/.ssh/id_rsa', 'h'), read('h')))", ENDS),
    ("by way of a folder", "never(*[lambda d=d: os.open('etc/passwd', 0, dir_fd=d) for d in range(64)], "
     "lambda: (os.chdir(OUTSIDE), read('.ssh/id_rsa')))", ENDS),
    ("by way of openat2", "import ctypes; never(lambda: syscall('openat2', -100, (OUTSIDE + '/.ssh/id_rsa').encode(), "
     "ctypes.create_string_buffer(24), 24))", ENDS),
    ("by handle", "never(lambda: syscall('name_to_handle_at', -100, b'/', 0, 0, 0), lambda: syscall('open_by_handle_at', "
     "0, 0, 0))", ENDS),
    ("inherited descriptors", "never(*[lambda d=d: os.fstat(d) for d in range(5, 1024)])", ENDS),
    ("read every descriptor", "for d in range(64):\n    if d != 3:\n        try: print(d, os.pread(d, 4096, "
     "0))\n        except OSError: pass", ENDS),
    ("processes", "never(*[lambda p=p, f=f: read(f'/proc/{p}/{f}') for p in ('self', 1, os.getppid(), PARENT)"
     " for f in ('environ', 'maps', 'mem', 'cmdline', 'status', 'root/etc/passwd', 'cwd/README.md')])", ENDS),
    ("descriptors by name", "never(*[lambda p=p: os.listdir(p) for p in ('/proc/self/fd', '/dev/fd', f'/proc/{PARENT}/fd')], "
     "*[lambda d=d: read(f'/proc/self/fd/{d}') for d in (1, 2, *range(5, 64))])", ENDS),
    ("devices", "never(*[lambda p=p: read(p) for p in ('/dev/mem', '/dev/kmsg', '/dev/tty', '/dev/ptmx', '/dev/vda', "
     "'/dev/sda', "
     "'/dev/shm/x', '/dev/fuse')], lambda: os.listdir('/dev'), lambda: open('/dev/shm/x', 'w'))", ENDS),
    ("make a device", "never(lambda: os.mknod('d', 0o20666, os.makedev(1, 1)), lambda: os.mknod('b', 0o60666, "
     "os.makedev(254, 0)))", ENDS),
    ("write", "never(lambda: open(OUTSIDE + '/made', 'w'), lambda: open(OUTSIDE + '/canary', 'a'), "
     "lambda: open(OUTSIDE + '/canary', 'r+'), "
     "lambda: os.open(OUTSIDE, os.O_TMPFILE | os.O_RDWR), lambda: os.mkdir(OUTSIDE + '/made'), "
     "lambda: os.mkfifo(OUTSIDE + '/made'), "
     "lambda: os.symlink('x', OUTSIDE + '/made'), lambda: os.link(OUTSIDE + '/canary', OUTSIDE + '/made'))", ENDS),
    ("rename", "never(lambda: os.rename(OUTSIDE + '/canary', OUTSIDE + '/made'), lambda: os.replace(OUTSIDE + '/canary', "
     "'made'), "
     "lambda: os.rename('.', OUTSIDE + '/made'))", ENDS),
    ("delete", "never(lambda: os.remove(OUTSIDE + '/canary'), lambda: os.rmdir(OUTSIDE + '/empty'), "
     "lambda: os.unlink('/etc/passwd'))", ENDS),
    ("truncate", "never(lambda: os.truncate(OUTSIDE + '/canary', 0), lambda: os.open(OUTSIDE + '/canary', os.O_TRUNC), "
     "lambda: os.open(os.__file__, os.O_TRUNC), lambda: os.truncate(os.__file__, 0))", ENDS),
    ("change of permissions", "never(*[lambda p=p: os.chmod(p, 0o777) for p in (OUTSIDE, OUTSIDE + '/canary', os.__file__)], "
     "lambda: os.chown(OUTSIDE + '/canary', 1, 1), lambda: os.utime(OUTSIDE + '/canary', (0, 0)), "
     "lambda: os.setxattr(OUTSIDE + '/canary', 'user.x', b'x'), lambda: os.utime(os.__file__, (0, 0)))", ENDS),
    ("change of the library", "lib = os.path.dirname(os.__file__)\nnever(lambda: open(os.__file__, 'a'), "
     "lambda: open(lib + '/evil.py', 'w'), "
     "lambda: os.remove(os.__file__), lambda: os.rename(os.__file__, lib + '/os2.py'), "
     "lambda: os.mkdir(lib + '/evil'))", ENDS),
    ("root folder", "never(lambda: os.mkdir('/made'), lambda: open('/made', 'w'), lambda: os.rename('/tmp', '/tmp2'), "
     "lambda: os.rmdir('/lib'))", ENDS),
    ("leave by chroot", "never(lambda: os.chroot('/'), lambda: os.chroot('.'), lambda: syscall('pivot_root', b'.', "
     "b'.'))", ENDS),
    ("mount", "never(lambda: syscall('mount', b'none', b'.', b'tmpfs', 0, 0), lambda: syscall('mount', 0, b'/', 0, 4128, 0), "
     "lambda: syscall('umount2', b'/tmp', 2), lambda: syscall('fsopen', b'proc', 0), lambda: syscall('open_tree', -100, "
     "b'/', 1), "
     "lambda: syscall('mount_setattr', -100, b'/', 0x8000, bytes(32), 32), lambda: syscall('move_mount', 1, b'', 1, b'', "
     "0))", ENDS),
]

NETWORK = [
    ("TCP", "import socket; never(lambda: socket.create_connection(('127.0.0.1', PORT), 1))", ENDS),
    ("TCP over IPv6", "import socket; never(lambda: socket.create_connection(('::1', PORT), 1), "
     "lambda: socket.socket(socket.AF_INET6))", ENDS),
    ("UDP", "import socket; never(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', "
     "PORT)))", ENDS),
    ("names", "import socket; never(lambda: socket.getaddrinfo('example.com', 80), "
     "lambda: socket.gethostbyname('example.com'))", ENDS),
    ("HTTP", "import urllib.request; never(lambda: urllib.request.urlopen(f'http://127.0.0.1:{PORT}', timeout=1))", ENDS),
    ("asyncio", "import asyncio; never(lambda: asyncio.run(asyncio.open_connection('127.0.0.1', PORT)))", ENDS),
    ("unix socket", "import socket; never(lambda: socket.socket(socket.AF_UNIX).connect(OUTSIDE + '/socket'))", ENDS),
    ("abstract socket", "import socket; never(lambda: socket.socket(socket.AF_UNIX).connect(b'\\0' + ABSTRACT))", ENDS),
    ("a pair that writes elsewhere", "import socket\nnever(lambda: socket.socketpair(socket.AF_UNIX, "
     "socket.SOCK_DGRAM)[0].sendto(b'x', b'\\0' + ABSTRACT), "
     "lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)[0].sendto(b'x', b'\\0' + ABSTRACT))", ENDS),
    ("listen", "import socket; never(lambda: socket.create_server(('127.0.0.1', 0)), "
     "lambda: socket.socket(socket.AF_UNIX).bind('s'))", ENDS),
    ("raw sockets", "import socket; never(*[lambda f=f, t=t: socket.socket(f, t) for f in (2, 10, 16, 17, 38, "
     "40) for t in (1, 2, 3)])", ENDS),
    ("socket by number", "never(*[lambda f=f: syscall('socket', f, t, 0) for f in range(46) for t in (1, 2, 3)])", ENDS),
]

OTHERS = [
    ("kill the parent", "never(*[lambda p=p, s=s: os.kill(p, s) for p in (PARENT, -PARENT, os.getppid(), 1, 0, "
     "-1) for s in (0, 15, 9)])", ENDS),
    ("kill the group", "never(lambda: os.killpg(os.getpgid(0), 9), lambda: os.killpg(0, 9))", ENDS),
    ("kill by number", "never(lambda: syscall('tgkill', PARENT, PARENT, 9), lambda: syscall('tkill', PARENT, 9), "
     "lambda: syscall('tgkill', 1, 1, 9), "
     "lambda: syscall('rt_sigqueueinfo', PARENT, 9, bytes(128)), lambda: syscall('pidfd_send_signal', 1, 9, 0, 0))", ENDS),
    ("signals by descriptor", "import fcntl; never(lambda: fcntl.fcntl(os.pipe()[0], 8, PARENT), lambda: fcntl.fcntl(1, "
     "10, 9), lambda: fcntl.fcntl(1, 1024, 0))", ENDS),
    ("debug", "never(*[lambda r=r, p=p: syscall('ptrace', r, p, 0, 0) for r in (0, 16, 0x4206) for p in (0, 1, PARENT, "
     "os.getppid())])", ENDS),
    ("read memory of others", "import ctypes\nnever(*[lambda n=n, p=p: syscall(n, p, bytes(16), 1, bytes(16), 1, 0)"
     " for n in ('process_vm_readv', 'process_vm_writev') for p in (1, PARENT, os.getppid())])", ENDS),
    ("take descriptors of others", "never(*[lambda p=p: syscall('pidfd_open', p, 0) for p in (1, PARENT)], "
     "lambda: syscall('pidfd_getfd', 1, 1, 0), "
     "lambda: syscall('kcmp', 1, PARENT, 0, 0, 0))", ENDS),
    ("priorities", "never(lambda: os.setpriority(0, PARENT, 19), lambda: os.nice(-5), "
     "lambda: os.sched_setaffinity(PARENT, [0]), "
     "lambda: os.sched_setscheduler(PARENT, 1, os.sched_param(1)), lambda: syscall('ioprio_set', 1, PARENT, 0))", ENDS),
    ("limits of others", "import resource; never(*[lambda p=p: resource.prlimit(p, resource.RLIMIT_NOFILE) for p in (1, "
     "PARENT, os.getppid())], "
     "lambda: resource.prlimit(PARENT, resource.RLIMIT_CPU, (1, 1)))", ENDS),
    ("become somebody", "never(lambda: os.setuid(0), lambda: os.setresuid(1, 1, 1), lambda: os.setgroups([0]), "
     "lambda: os.setgid(0), "
     "lambda: syscall('capset', bytes(8), bytes(24)))", ENDS),
    ("namespaces of its own", "never(*[lambda f=f: syscall('unshare', f) for f in (0x10000000, 0x20000, 0x40000000, "
     "0x400)], lambda: syscall('setns', 1, 0))", ENDS),
    ("the kernel's doors", "never(*[lambda n=n: syscall(n, 0, 0, 0, 0, 0) for n in ('bpf', 'keyctl', 'add_key', "
     "'perf_event_open', "
     "'userfaultfd', 'io_uring_setup', 'seccomp', 'init_module', 'kexec_load', 'reboot', 'syslog', 'fanotify_init', "
     "'inotify_init1', "
     "'clock_settime', 'swapon', 'quotactl', 'acct', 'vmsplice', 'process_madvise', 'landlock_create_ruleset')])", ENDS),
    ("personality", "never(lambda: syscall('personality', 0x0040000), lambda: syscall('prctl', 4, 1, 0, 0, 0), "
     "lambda: syscall('sethostname', b'x', 1))", ENDS),
    # 335 and 336 on x86_64, uretprobe and uprobe, kill whoever calls them by hand; the kernel lets them past seccomp.
    ("every other system call", "import ctypes\nlibc = ctypes.CDLL(None, "
     "use_errno=True)\nfor n in range(600):\n    for n in (n, n | 0x40000000):\n"
     "        if n not in {*ALLOWED, 335, 336} and not (libc.syscall(n, -1, -1, -1, -1, -1, "
     "-1) == -1 and ctypes.get_errno() == 13): breach(n)", ENDS),
]
if platform.machine() == "x86_64":  # mov eax, 20 (getpid of 32 bits); int 0x80; ret
    OTHERS.append(("a call in the old way", "import ctypes, mmap\nm = mmap.mmap(-1, 4096, "
    "prot=7)\nm.write(bytes.fromhex('b814000000cd80c3'))\n"
                   "breach(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))())",
                   "killed by signal (31|11)"))

INSIDE = [
    ("subclasses", "for c in object.__subclasses__():\n    g = getattr(c.__init__, '__globals__', {})\n"
     "    if 'system' in g and g['system'](f'touch {OUTSIDE}/made') == 0: breach('system')", ENDS),
    ("frames", "f = sys._getframe()\nwhile f:\n    print(f.f_code.co_name, f.f_locals, f.f_globals)\n    f = f.f_back", ENDS),
    ("all objects", "import gc\nfor o in gc.get_objects():\n    if isinstance(o, (dict, list, "
     "tuple)): print(repr(o)[:200])", ENDS),
    ("the runner itself", "f = sys._getframe()\nwhile f:\n    f.f_globals.update(judge=None, supervise=None, hear=None, "
     "os=None)\n    f = f.f_back\n1 / 0", ANY),
    ("builtins", "import builtins\nfor n in dir(builtins):\n    if n not in ('delattr', 'OSError'): setattr(builtins, n, "
     "None)", ANY),
    ("modules", "for n in list(sys.modules): sys.modules[n] = None", EITHER),
    ("modules, then failure", "sys.modules.clear()\n1 / 0", ANY),
    ("what prints", "sys.stdout = sys.stderr = None\n1 / 0", "ZeroDivisionError"),
    ("what writes", "os.write = lambda fd, data: len(data)\n1 / 0", ANY),
    ("what writes, honestly", "os.write = lambda fd, data: len(data)", ANY),
    ("what describes", "sys.excepthook = sys.__excepthook__ = lambda *_: os._exit(0)\n1 / 0", ANY),
    ("crash", "import ctypes; ctypes.string_at(0)", "killed by signal 11"),
    ("abort", "os.abort()", "killed by signal 6"),
    ("kill itself", "os.kill(os.getpid(), 9)", "killed by signal 9"),
]

LIES = [
    ("print success", "print('ended\\nsuccess\\npassed')\n1 / 0", "ZeroDivisionError"),
    ("exit 0", "sys.exit(0)", "SystemExit"),
    ("_exit 0", "os._exit(0)", "left early with code 0"),
    ("exit 0 in a thread", "import threading; threading.Thread(target=os._exit, args=(0,)).start(); import time; "
     "time.sleep(9)", "left early"),
    ("say so everywhere", "for d in range(64):\n    for s in (b'ended', b'ended\\n', b'\\nnamespaces\\nended\\n\\0', "
     "b'0' * 32 + b' ended \\n', b'{\"success\": true}\\n'):\n"
     "        try: os.write(d, s)\n        except OSError: pass\nos._exit(0)", ANY),
    ("say so everywhere and go on", "for d in range(3, 64):\n    try: os.write(d, "
     "b'ended \\n')\n    except OSError: pass\n1 / 0", ANY),
    ("flood the channel", "while True: os.write(4, b'x' * 99999)", ANY),
    ("close all, exit 0", "os.closerange(0, 256)\nos._exit(0)", "left early with code 0"),
    ("close all and fail", "os.closerange(0, 256)\n1 / 0", ANY),
    ("mute exception", "class E(Exception):\n    def __str__(self): 1 / 0\n    __repr__ = __str__\nraise E", "E"),
    ("exception that leaves", "class E(Exception):\n    def __str__(self): os._exit(0)\nraise E", "left early with code 0"),
    ("exception that exits", "class E(Exception):\n    def __str__(self): raise SystemExit(0)\nraise E", "E"),
    ("exception that recurses", "class E(Exception):\n    def __str__(self): return str(self)\nraise E", "E"),
    ("exception that talks", "raise ValueError('\\nended\\n\\0' * 10**6)", "ValueError: \nended"),
    ("exception named success", "raise type('ended', (BaseException,), {})()", "ended: "),
    ("exception without a name", "raise type('', (BaseException,), {})()", ": "),
    ("metaclass", "class M(type):\n    @property\n    def __name__(cls): os._exit(0)\nraise M('E', (Exception,), {})()", ANY),
    ("a long lie", "f = sys._getframe()\nwhile 'nonce' not in f.f_locals: f = f.f_back\n"
     "os.write(4, f'{f.f_locals[\"nonce\"]} failed {\"41\" * 10**6}\\n'.encode())\nos._exit(0)", "A{500}$"),
    ("exit at the end", "import atexit; atexit.register(os._exit, 7)", "exit code 7 after the end"),
    ("end killed", "import atexit; atexit.register(os.kill, os.getpid(), 9)", "killed by signal 9"),
    ("interrupt", "raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("generator exit", "raise GeneratorExit", "GeneratorExit"),
]

PROGRAMS = [*PROCESSES, *TOO_MUCH, *TOO_LONG, *FILES, *NETWORK, *OTHERS, *INSIDE, *LIES]
WAYS = {"all layers": LAYERS, "without namespaces": LAYERS[1:]}
CASES = [(way, name) for way in WAYS for name, _, _ in PROGRAMS]

# Programs that pretend to add a number which only the tests know.
TESTS = "import random\nfor _ in range(4):\n    x = random.randrange(10**9)\n    assert f(x) == x + 987654321\n"
DIG = """
def nonce():
    import sys
    frame = sys._getframe()
    while 'nonce' not in frame.f_locals or frame.f_code.co_name == 'nonce': frame = frame.f_back
    return frame.f_locals['nonce']
def line(kind, text=''): return f'{nonce()} {kind} {text.encode().hex()}\\n'.encode()
"""
ANYTHING = ("class Any({base}):\n    __eq__ = __le__ = __ge__ = __ne__ = lambda *_: True\n    __hash__ = lambda s: 0\n"
            "    {more}\ndef f(x): return Any()")
CHEATS = [
    ("equal to everything", ANYTHING.format(base="object", more="pass")),
    ("a number equal to everything", ANYTHING.format(base="int", more="pass")),
    ("a float equal to everything", ANYTHING.format(base="float", more="pass")),
    ("a string equal to everything", ANYTHING.format(base="str", more="pass")),
    ("a list equal to everything", ANYTHING.format(base="list", more="pass")),
    ("a dict equal to everything", ANYTHING.format(base="dict", more="pass")),
    ("says it is a number", ANYTHING.format(base="object", more="__class__ = int\n    __int__ = __index__ = lambda s: 0")),
    ("not a number", "def f(x): return float('nan')"),
    ("nothing", "def f(x): pass"),
    ("patched builtins", "import builtins\nbuiltins.AssertionError = Warning\n"
     "builtins.isinstance = lambda *_: True\nbuiltins.int = str\ndef f(x): return 0"),
    ("patched random", "import random\nrandom.randrange = lambda *_: 0\ndef f(x): return 987654321 if x == 0 else 0"),
    ("leaves in the call", "import os\ndef f(x): os._exit(0)"),
    ("exits in the call", "import sys\ndef f(x): sys.exit(0)"),
    ("raises in the call", "def f(x): raise StopIteration"),
    ("loops in the call", "def f(x):\n    while True: pass"),
    ("stops in the call", "import os\ndef f(x): os.kill(os.getpid(), 19)"),
    ("dies in the call", "import os\ndef f(x): os.kill(os.getpid(), 9)"),
    ("closes the channel", "import os\ndef f(x): os.closerange(3, 64)"),
    ("no such function", "g = 1"),
    ("not a function", "f = 1"),
    ("answers before it is asked", DIG + "import os\nfor _ in range(99): os.write(4, line('ended') + line('value', "
     "'1'))\ndef f(x): return 1"),
    ("says that the tests passed", DIG + "import os\ndef f(x):\n    os.write(4, "
     "line('ended') + line('passed') + b'\\nnamespaces\\nended\\n\\0')\n    os._exit(0)"),
    ("talks over itself", "import os, threading\ndef t():\n    while True: os.write(4, b'0 value 31\\n')\n"
     "threading.Thread(target=t, daemon=True).start()\ndef f(x): return 0"),
    ("frames", "import sys, re\ndef f(x):\n    frame, seen = sys._getframe(), "
     "''\n    while frame:\n        seen += repr(frame.f_locals) + repr(frame.f_globals)\n"
     "        frame = frame.f_back\n    return x + int(re.search(r'x \\+ (\\d+)', seen.replace('x + int', ''))[1])"),
    ("memory", "import gc, re\ndef f(x):\n    for o in gc.get_objects():\n        found = re.search(r'== x \\+ (\\d+)', "
     "repr(o)[:10**6])\n"
     "        if found: return x + int(found[1])"),
    ("the request on stdin", "import os\ndef f(x):\n    for d in range(64):\n        if d != 3:\n"
     "            try: print(os.pread(d, 10**6, 0))\n            except OSError: pass\n    return 0"),
    ("the supervisor's memory", "import os\ndef f(x): return open(f'/proc/{os.getppid()}/mem', 'rb').read(1)"),
    ("kills the supervisor", "import os\ndef f(x): os.kill(os.getppid(), 9)"),
    ("contains itself", "x = []\nx.append(x)\ndef f(_): return x"),
    ("ten megabytes", "def f(x): return 'x' * 10**7"),
    ("ten megabytes at once", DIG + "import os\ndef f(x): os.write(4, b'x' * 10**7)"),
    ("very deep", "import json\njson.dumps = lambda value: '[' * 10**6\ndef f(x): return 0"),
    ("doubled and doubled", "x = [0]\nfor _ in range(60): x = [x, x]\ndef f(_): return x"),
    ("a long number", "import json\njson.dumps = lambda value: '9' * 10**6\ndef f(x): return 0"),
    ("an object in JSON", "import json\njson.dumps = lambda value: '{\"__class__\": \"int\"}'\ndef f(x): return 0"),
    ("an unknown kind", "import json\njson.dumps = lambda value: '[\"eval\", \"1\"]'\ndef f(x): return 0"),
    ("no JSON", "import json\njson.dumps = lambda value: 'x + 987'\ndef f(x): return 0"),
    ("takes all memory", "def f(x):\n    y = []\n    while True: y.append([])"),
    ("a function", "def f(x): return lambda: 0"),
    ("a generator", "def f(x): yield 0"),
]


def world(folder):
    """What must be the same afterwards."""
    states = {str(p): p.lstat() for p in [folder, *folder.rglob("*")]}
    entries = {path: (s.st_mode, s.st_uid, s.st_mtime_ns, s.st_size) for path, s in states.items()}
    library = Path(os.__file__)
    texts = {str(p): p.read_bytes() for p in [*folder.rglob("*"), library] if p.is_file()}
    names = sorted(os.listdir(library.parent)), library.stat().st_mode, library.stat().st_mtime_ns
    limits = [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE)]
    me = psutil.Process()
    return entries, texts, names, limits, os.nice(0), os.sched_getaffinity(0), me.children(), me.num_fds()


def sandboxed_processes():
    """Every process that a run of this test left behind, also among those that init has taken over."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if BOOT in (process.info["cmdline"] or ()) and str(os.getpid()) == process.info["cmdline"][-1]:
                found.append(process)
        except psutil.Error:
            pass
    return found


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """A home with secrets and open ears; gives (the prelude, the folder, the sockets that must stay silent)."""
    secret = os.urandom(16).hex()
    folder = tmp_path_factory.mktemp("home")
    (folder / ".ssh").mkdir()
    (folder / "empty").mkdir()
    for name in (".ssh/id_rsa", "canary"):
        (folder / name).write_text(secret)
    os.environ["API_KEY"] = secret
    inherited = os.open(folder / ".ssh/id_rsa", os.O_RDWR)
    os.set_inheritable(inherited, True)
    tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    port = tcp.getsockname()[1]
    udp.bind(("127.0.0.1", port))
    path, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    packets = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    path.bind(str(folder / "socket"))
    name = f"nanochat-{os.getpid()}".encode()
    abstract.bind(b"\0" + name)
    packets.bind(b"\0" + name + b"-packets")
    path.listen()
    abstract.listen()
    ears = [tcp, udp, path, abstract, packets]
    column = {"x86_64": 0, "aarch64": 1}[platform.machine()]

    def numbers(table):
        pairs = [(name, both.split("/")[column]) for name, _, both in (entry.partition(":") for entry in table.split())]
        return {name: int(number) for name, number in pairs if number != "-"}

    values = {"OUTSIDE": str(folder), "PROJECT": str(Path(__file__).resolve().parent.parent), "PARENT": os.getpid(), "PORT": port,
              "ABSTRACT": name, "NUMBERS": numbers(NUMBERS), "ALLOWED": {*numbers(SYSTEM_CALLS).values()}}
    prelude = PRELUDE + "".join(f"{key} = {value!r}\n" for key, value in values.items())
    yield prelude, folder, ears, secret
    del os.environ["API_KEY"]
    os.close(inherited)
    for ear in ears:
        ear.close()


@pytest.fixture(scope="module")
def aftermath(surroundings):
    """All programs and cheats, run: {(way, name): (result, seconds)}, and what of the world has changed."""
    prelude, folder, ears, secret = surroundings

    def run(case):
        way, name, program, seen = case
        started = time.monotonic()
        if seen is None:
            result = execute_tests(TESTS, program, "f", timeout=2, layers=WAYS[way])
        else:
            result = execute_code(prelude + program, timeout=1 if seen == LATE else 5, layers=WAYS[way])
        return (way, name), (result, time.monotonic() - started)

    has_namespaces()
    scratch, tempfile.tempdir = tempfile.tempdir, str(folder.parent / "scratch")
    os.mkdir(tempfile.tempdir)
    try:
        before = world(folder)
        rows = [*PROGRAMS, *((f"tests: {name}", program, None) for name, program in CHEATS)]
        cases = [(way, *row) for way in WAYS for row in rows]
        with ThreadPoolExecutor(6) as pool:
            results = dict(pool.map(run, cases))
        after = world(folder)
        remains = os.listdir(tempfile.tempdir)
    finally:
        tempfile.tempdir = scratch
    for ear in ears:
        ear.setblocking(False)
    return results, before, after, remains


def test_the_world_is_what_it_was(aftermath, surroundings):
    _, before, after, remains = aftermath
    assert after == before and remains == []
    assert sandboxed_processes() == []
    tcp, udp, path, abstract, packets = surroundings[2]
    for listener in (tcp, path, abstract):
        with pytest.raises(BlockingIOError):
            listener.accept()
    for receiver in (udp, packets):
        with pytest.raises(BlockingIOError):
            receiver.recv(1)


@pytest.mark.parametrize("way, name", CASES, ids=[f"{name}, {way}" for way, name in CASES])
def test_hostile_program(aftermath, surroundings, way, name):
    result, seconds = aftermath[0][way, name]
    seen = {name: seen for name, _, seen in PROGRAMS}[name]
    said = result.stdout + result.stderr
    assert "BREACH" not in said and surroundings[3] not in said, said[:2000]
    assert seconds < (1 if seen == LATE else 5) + 2
    assert result.success == (seen == ENDS) or seen == EITHER, result
    assert result.timeout == (seen == LATE) or seen in (ANY, EITHER), result
    assert result.memory_exceeded or seen != MEMORY, result
    if seen not in (ENDS, LATE, MEMORY, ANY, EITHER):
        assert re.search(seen, result.error), result
    assert len(result.stdout) <= 2**20 and len(result.stderr) <= 2**20 and len(result.error or "") <= 510
    assert set(result.layers) >= set(WAYS[way][1:] if not has_namespaces() else WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name, _ in CHEATS])
def test_no_cheat_passes_the_tests(aftermath, way, name):
    result, seconds = aftermath[0][way, f"tests: {name}"]
    assert not result.success and result.error and seconds < 4, result
    assert "987654321" not in result.stdout


def test_an_answer_that_never_came_is_no_exception_that_a_test_may_expect():
    tests = "try: f(1)\nexcept Exception: pass\nelse: raise SystemExit"
    assert execute_tests(tests, "def f(x): return 1 / 0", "f").success
    for body in ("os._exit(0)", "os.close(4)", "os.write(4, b'x\\n')"):
        assert not execute_tests(tests, f"import os\ndef f(x): {body}", "f").success


def test_a_parent_with_many_open_files_hands_on_none():
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
import asyncio, base64, bisect, collections, copy, csv, datetime, decimal, enum, fractions, functools, hashlib, heapq, io
import itertools, json, logging, math, operator, os, pathlib, pickle, random, re, secrets, shutil, sqlite3, statistics
import string, sys, tempfile
import textwrap, threading, time, typing, unittest, uuid, zlib, zoneinfo
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
    import signal
    signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    time.sleep(1)
except ZeroDivisionError:
    print("woken")
"""
    for layers in WAYS.values():
        result = execute_code(program, timeout=20, layers=layers)
        assert result.success and result.stdout == "woken\n", result


@pytest.mark.parametrize(
    "column, header",
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")],
)
def test_the_numbers_are_those_of_the_kernels_headers(column, header):
    if not os.path.exists(header):
        pytest.skip("no kernel headers here")
    defined = {}
    for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()):
        defined[name] = int(number)
    if column == 1:
        defined["newfstatat"] = defined["fstatat"]  # its name there
    for entry in (SYSTEM_CALLS + NUMBERS).split():
        name, both = entry.split(":")
        if (number := both.split("/")[column]) != "-":
            assert defined[name] == int(number), name


def test_a_run_that_is_interrupted_leaves_no_process(monkeypatch):
    import select

    class Interrupted:
        def register(self, *_):
            pass

        def poll(self, _):
            time.sleep(0.3)  # by now the program runs
            raise KeyboardInterrupt

    monkeypatch.setattr(select, "poll", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute_code("while True: pass")
    for _ in range(100):
        if not [p for p in sandboxed_processes() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
            break
        time.sleep(0.02)
    else:
        raise AssertionError(sandboxed_processes())


def test_it_ends_with_us(tmp_path):
    """Whoever started it is killed, with no time to clean up."""
    import subprocess

    for layers in WAYS.values():
        code = f"from nanochat.execution import execute_code\nexecute_code('while True: pass', 60, layers={layers!r})"
        starter = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
        family = []
        for _ in range(500):
            time.sleep(0.02)
            family = psutil.Process(starter.pid).children(recursive=True)
            if any(process.cpu_times().user > 0.1 for process in family) and len(family) == 3:
                break
        assert len(family) == 3
        starter.kill()
        starter.wait()
        gone, alive = psutil.wait_procs(family, timeout=5)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_plain_data_survives_the_journey():
    from nanochat.sandbox import from_plain, to_plain

    value = [None, True, -1, 2**200, -(10**18), 1.5, float("inf"), "\ud800é", b"\xff", 2j, (1, [2])]
    value.append({1: {2}, "a": (), (1,): frozenset({3})})
    assert repr(from_plain(json.loads(json.dumps(to_plain(value))))) == repr(value)
    for hostile in ({}, [], [1], ["list"], ["list", 1], ["eval", "x"], ["int", 1], ["dict", [[["list", []], 1]]], ["bytes", 5]):
        with pytest.raises((ValueError, TypeError)):
            from_plain(hostile)
