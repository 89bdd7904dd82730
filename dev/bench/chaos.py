"""Does anything get lost? Training killed over and over, checkpoints damaged, downloads with every fault at once.

    python -m dev.bench.chaos kill                # 60 rounds; about 20 minutes on two cores
    python -m dev.bench.chaos corrupt             # 200 corruptions
    python -m dev.bench.chaos download            # needs the stand-in hub beside the repository

Each prints a table and exits 1 if anything in it is wrong; then the folder with the logs is kept and named.

The one idea to know: the judge is always something undisturbed. A run that was killed must end with
the files of one that was not, byte for byte; a damaged checkpoint must be refused or give exactly what was
saved; a download must be what a plain GET from a healthy server brings. What is killed, where and when,
follows from --seed; how far the program has come at that moment is chance.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parents[2]
HUB = ROOT.parent / "shared" / "hub" / "serve.py"
END_WITHIN = 60  # seconds from the kill until torchrun has ended
STEPS_PER_ROUND = 20  # a round trains at most so many steps before it is killed


# -----------------------------------------------------------------------------
# A small training job on two ranks


class Job:
    """torchrun with two ranks of a depth-2 model, its output in `log`."""

    def __init__(self, base: Path, tag: str, iterations: int, log: Path, resume: bool = False, compiled: bool = False):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "scripts.base_train",
                   "--device-type=cpu", "--depth=2", "--aspect-ratio=32", "--head-dim=32", "--max-seq-len=64", "--device-batch-size=2",
                   "--total-batch-size=256", f"--num-iterations={iterations}", "--eval-every=-1", "--eval-tokens=256",
                   "--core-metric-every=-1", "--sample-every=0", "--save-every=2", "--keep-last=3", f"--source={base / 'text'}",
                   f"--model-tag={tag}", f"--resume-from-step={'latest' if resume else -1}"]
        self.base, self.log = base, log
        self.directory = base / "base_checkpoints" / tag
        with open(log, "w") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment(base, compiled), stdout=output, stderr=subprocess.STDOUT)

    def ranks(self) -> dict:
        """{rank: its psutil.Process}, of those that have been started."""
        import psutil

        found = {}
        try:
            for child in psutil.Process(self.process.pid).children():
                found[int(child.environ()["RANK"])] = child
        except (psutil.Error, KeyError):  # just ended, or just forked
            pass
        return found

    def steps(self) -> list[int]:
        """The steps that its output tells of."""
        return [int(number) for number in re.findall(r"^step (\d+) \(", self.log.read_text(), re.M)]

    def wait_until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Raise RuntimeError if the job ends, or the time is up, before the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                state = f"ended with {self.process.returncode}" if self.process.returncode is not None else "does not get on"
                raise RuntimeError(f"the run {state} by itself; the end of {self.log}:\n{tail(self.log)}")
            time.sleep(0.001)

    def finish(self) -> None:
        code = self.process.wait()
        if code != 0:
            raise RuntimeError(f"the run ended with {code}; the end of {self.log}:\n{tail(self.log)}")


def environment(base: Path, compiled: bool = False, **more) -> dict:
    """Uncompiled unless asked: starting is then quick, and most of a round is not spent on it."""
    return {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": str(int(not compiled)), **more}


def tail(path: Path, lines: int = 30) -> str:
    return "\n".join(path.read_text().splitlines()[-lines:])


def prepare(base: Path) -> None:
    """Text and a tokenizer, all that training needs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from nanochat.sample_world import documents

    (base / "text").mkdir(parents=True)
    texts = [text for _, text in zip(range(900), documents())]
    for shard in range(3):
        table = pa.table({"text": texts[shard * 300 : (shard + 1) * 300]})
        pq.write_table(table, base / "text" / f"shard_{shard}.parquet", row_group_size=25)
    command = [sys.executable, "-m", "scripts.tok_train", f"--source={base / 'text'}", "--vocab-size=600"]
    subprocess.run(command, cwd=ROOT, env=environment(base), check=True, stdout=subprocess.DEVNULL)


def survivors(base: Path) -> list:
    """Processes of ours that are still there, known by the folder they work in."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("NANOCHAT_BASE_DIR") == str(base):
                found.append(process)
        except psutil.Error:  # another user's, or just ended
            pass
    return found


# -----------------------------------------------------------------------------
# kill

KINDS = {  # name -> (signal, who gets it: a rank's number, "torchrun" or "all")
    "KILL rank 0": (signal.SIGKILL, 0), "KILL rank 1": (signal.SIGKILL, 1), "KILL torchrun": (signal.SIGKILL, "torchrun"),
    "KILL all": (signal.SIGKILL, "all"), "TERM torchrun": (signal.SIGTERM, "torchrun"),
    "TERM rank 0": (signal.SIGTERM, 0), "TERM rank 1": (signal.SIGTERM, 1),
}
MOMENTS = ("start", "train", "save")


def kill(base: Path, rounds: int, rng: random.Random, compiled: bool) -> list[str]:
    """Kill and resume a run `rounds` times, let it finish, compare it with an undisturbed one; returns what went wrong."""
    from nanochat.checkpoint_manager import list_steps, verify

    iterations = 3 * STEPS_PER_ROUND * rounds  # more than the rounds can use up: orphans go on for a few seconds
    prepare(base)
    started = time.monotonic()
    calm = Job(base, "calm", iterations, base / "calm.log", compiled=compiled)
    calm.wait_until(calm.steps, 600)
    start_seconds = time.monotonic() - started
    calm.finish()
    step_seconds = (time.monotonic() - started - start_seconds) / iterations
    print(f"undisturbed: {iterations} steps of {1000 * step_seconds:.0f} ms, the first after {start_seconds:.1f} s", flush=True)

    pairs = [(moment, kind) for moment in MOMENTS for kind in KINDS]
    plan = [pair for _ in range(0, rounds, len(pairs)) for pair in rng.sample(pairs, len(pairs))][:rounds]
    wrong, damaged, half_written, lost = [], 0, 0, []
    print("round moment kind            from    at  saved  lost  exit  ended s  whole  half-written")
    for number, (moment, kind) in enumerate(plan):
        job = Job(base, "storm", iterations, base / f"storm_{number:02d}.log", bool(list_steps(base / "base_checkpoints/storm")), compiled)
        before = max(list_steps(job.directory), default=0)
        wait_for_moment(job, moment, rng, start_seconds, step_seconds)
        strike(job, kind)
        at, struck = max(job.steps(), default=before), time.monotonic()
        try:
            code, ended = job.process.wait(END_WITHIN), time.monotonic() - struck
        except subprocess.TimeoutExpired:
            code, ended = None, float("inf")
            wrong.append(f"round {number}: torchrun still ran {END_WITHIN} s after {kind}")
            strike(job, "KILL all")
        whole = 0
        for step in list_steps(job.directory):
            try:
                verify(job.directory, step)
                whole += 1
            except ValueError as error:
                if (job.directory / f"step_{step:06d}").exists():  # else an orphan has removed it since: --keep-last
                    damaged += 1
                    wrong.append(f"round {number}: {error}")
        saved, half = max(list_steps(job.directory), default=0), len(list(job.directory.glob(".step_*")))
        half_written += half > 0
        print(f"{number:5d} {moment:6s} {kind:13s} {before:6d} {at:5d} {saved:6d} {max(at - saved, 0):5d} {code!s:>5s} {ended:8.1f} "
              f"{whole:6d} {half:13d}", flush=True)
        if saved < before:
            wrong.append(f"round {number}: step {before} was saved, and only {saved} is there now")
        if moment != "start":
            if KINDS[kind][0] == signal.SIGKILL:
                lost.append(max(at - saved, 0))
            elif saved < at:
                wrong.append(f"round {number}: {kind} at step {at} left only step {saved} saved")
            if kind.startswith("TERM rank") and code != 0:
                wrong.append(f"round {number}: {kind} at step {at} ended with {code}, not 0")

    Job(base, "storm", iterations, base / "storm_end.log", resume=True, compiled=compiled).finish()
    folders = [base / "base_checkpoints" / tag for tag in ("calm", "storm")]
    digests = [{name: file["sha256"] for name, file in verify(folder, iterations)["files"].items()} for folder in folders]
    wrong += [f"{name} is not that of the undisturbed run" for name in digests[0] if digests[0][name] != digests[1].get(name)]
    curves = [[(line["step"], line.get("raw_loss")) for line in map(json.loads, open(folder / "metrics.jsonl"))] for folder in folders]
    if curves[0] != curves[1]:
        wrong.append("metrics.jsonl does not tell the losses of the undisturbed run")
    deadline = time.monotonic() + END_WITHIN
    while (left := survivors(base)) and time.monotonic() < deadline:
        time.sleep(0.2)
    wrong += [f"process {process.pid} is still there" for process in left]
    print(f"{rounds} kills; {half_written} left a half-written save behind; unreadable checkpoints: {damaged}; steps lost by SIGKILL: "
          f"median {sorted(lost)[len(lost) // 2] if lost else 0}, at most {max(lost, default=0)} (a save every 2)")
    print(f"{', '.join(sorted(digests[0]))}: {'byte for byte' if digests[0] == digests[1] else 'NOT'} those of the undisturbed run")
    return wrong


def wait_for_moment(job: Job, moment: str, rng: random.Random, start_seconds: float, step_seconds: float) -> None:
    if moment == "start":
        time.sleep(rng.uniform(0, start_seconds))
        return
    steps = rng.randint(1, STEPS_PER_ROUND)
    job.wait_until(lambda: len(job.steps()) >= steps)
    if moment == "train":
        time.sleep(rng.uniform(0, 3 * step_seconds))
    else:  # older hidden folders may be what an earlier round left
        seen = time.time()
        job.wait_until(lambda: any(modified(path) > seen for path in job.directory.glob(".step_*")))
        time.sleep(rng.uniform(0, 0.02))


def modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def strike(job: Job, kind: str) -> None:
    import psutil

    number, target = KINDS[kind]
    if isinstance(target, int):
        there = {}
        job.wait_until(lambda: there.update(job.ranks()) or target in there)
        victims = [there[target]]
    else:
        victims = [psutil.Process(job.process.pid), *(job.ranks().values() if target == "all" else ())]
    for victim in victims:
        try:
            victim.send_signal(number)
        except psutil.NoSuchProcess:
            pass


# -----------------------------------------------------------------------------
# corrupt


def corrupt(base: Path, rounds: int, rng: random.Random, compiled: bool) -> list[str]:
    prepare(base)
    job = Job(base, "d2", 6, base / "train.log", compiled=compiled)
    job.finish()
    return damage_and_load(job.directory, rounds, rng)


NEEDS = {  # a way to load -> the files that it needs
    "weights": {"meta.json", "model.safetensors"},
    "rank 0": {"meta.json", "model.safetensors", "optimizer_rank0.safetensors"},
    "rank 1": {"meta.json", "model.safetensors", "optimizer_rank1.safetensors"},
}


def damage_and_load(directory: Path, rounds: int, rng: random.Random) -> list[str]:
    """Damage copies of a folder of checkpoints of two ranks and load every step in every way; returns what went wrong."""
    from safetensors.torch import load_file

    from nanochat.checkpoint_manager import find_last_step, list_steps, verify
    from nanochat.common import UserError

    saved, steps = content(directory), list_steps(directory)
    names = ("model", "optimizer_rank0", "optimizer_rank1")
    truth = {(step, name): load_file(directory / f"step_{step:06d}" / f"{name}.safetensors") for step in steps for name in names}
    wrong, table = [], {kind: Counter() for kind in DAMAGES}
    for number in range(rounds):
        kind, step = list(DAMAGES)[number % len(DAMAGES)], rng.choice(steps)
        copy = directory.with_name(f"{directory.name}_{number:03d}")
        for _ in range(100):  # a flip that leaves what a JSON file says as it was is no damage: draw again
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(directory, copy)
            what = DAMAGES[kind](copy, step, rng)
            if content(copy) != saved:
                break
        here, count, faults, whole = content(copy), table[kind], [], []
        count["rounds"] += 1
        for step in list_steps(copy):
            folder = f"step_{step:06d}"
            names = {name for where, name in {*saved, *here} if where == folder}
            changed = {name for name in names if saved.get((folder, name)) != here.get((folder, name))}
            count["damaged"] += bool(changed)
            whole += [] if changed else [step]
            for way, needs in {**NEEDS, "verify": names}.items():
                try:
                    exact = bool(verify(copy, step)) if way == "verify" else loads_exactly(copy, step, way, truth)
                    if changed & needs:
                        faults.append(f"step {step} passes as whole ({way})")
                    elif not exact:
                        faults.append(f"step {step} loads as something that was never saved ({way})")
                except UserError as error:
                    count[way] += bool(changed)
                    if not changed:
                        faults.append(f"step {step} is whole, but refused ({way}): {error}")
                    if "\n" in str(error):
                        faults.append(f"more than one line: {error}")
                except Exception as error:
                    faults.append(f"step {step} ({way}) raises {type(error).__name__}: {error}")
        with redirect_stdout(io.StringIO()) as said:
            latest = find_last_step(copy)
        count["latest"] += latest == max(whole)
        if latest != max(whole):
            faults.append(f"latest is step {latest}, not {max(whole)}")
        if latest != max(steps) and "damaged" not in said.getvalue():
            faults.append(f"latest falls back to step {latest} without a word")
        count["faults"] += bool(faults)
        wrong += [f"round {number}, {kind} ({what}): {fault}" for fault in faults]
        shutil.rmtree(copy)
    print("damaged checkpoints, and how many were refused: by a load of the weights, by one with the optimizer as rank 0 or 1, by verify")
    columns = ("rounds", "damaged", "weights", "rank 0", "rank 1", "verify", "latest", "faults")
    print(f"{'damage':14s}" + "".join(f"{column:>9s}" for column in columns))
    for kind, count in table.items():
        print(f"{kind:14s}" + "".join(f"{count[column]:9d}" for column in columns))
    return wrong


def loads_exactly(directory: Path, step: int, way: str, truth: dict) -> bool:
    """Load one step in one of the `NEEDS` ways; whether that gave exactly what was saved."""
    import torch

    from nanochat.checkpoint_manager import load_checkpoint
    from nanochat.common import Compute

    rank = int(way[-1]) if way.startswith("rank") else None
    compute = Compute(torch.device("cpu"), torch.float32, rank or 0, rank or 0, 1 if rank is None else 2)
    wanted = truth.get((step, f"optimizer_rank{rank}"))
    blank = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()} if wanted else None
    model, optimizer, _ = load_checkpoint(directory, step, compute, wanted=blank)
    return same(model, truth.get((step, "model"))) and same(optimizer, wanted)


def same(one: dict | None, other: dict | None) -> bool:
    import torch

    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def content(directory: Path) -> dict[tuple[str, str], object]:
    """{(folder, file name): its bytes, or what it says where it is JSON} of the checkpoints in a folder."""
    found = {}
    for path in directory.glob("step_*/*"):
        found[path.parent.name, path.name] = path.read_bytes()
        if path.suffix == ".json":
            try:
                found[path.parent.name, path.name] = json.loads(path.read_bytes())
            except ValueError:
                pass
    return found


# Each damages a step of the folder of checkpoints and tells what it did.


def any_file(directory: Path, step: int, rng: random.Random) -> Path:
    return rng.choice(sorted((directory / f"step_{step:06d}").iterdir()))


def flip(directory, step, rng):
    path = any_file(directory, step, rng)
    data, place = bytearray(path.read_bytes()), rng.randrange(path.stat().st_size)
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{path.name}, byte {place}"


def truncate(directory, step, rng):
    path = any_file(directory, step, rng)
    size = rng.randrange(1, path.stat().st_size)
    os.truncate(path, size)
    return f"{path.name} to {size} bytes"


def empty(directory, step, rng):
    path = any_file(directory, step, rng)
    os.truncate(path, 0)
    return path.name


def delete(directory, step, rng):
    path = any_file(directory, step, rng)
    path.unlink()
    return path.name


def append(directory, step, rng):
    path = any_file(directory, step, rng)
    with open(path, "ab") as file:
        file.write(rng.randbytes(rng.randint(1, 64)))
    return path.name


def swap(one: Path, other: Path) -> str:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return f"{one.parent.name}/{one.name} and {other.parent.name}/{other.name}"


def another(directory, step, rng):
    return rng.choice([folder for folder in sorted(directory.glob("step_*")) if folder.name != f"step_{step:06d}"])


def swap_files(directory, step, rng):
    path = any_file(directory, step, rng)
    return swap(path, another(directory, step, rng) / path.name)


def swap_ranks(directory, step, rng):
    return swap(*(directory / f"step_{step:06d}" / f"optimizer_rank{rank}.safetensors" for rank in (0, 1)))


def swap_folders(directory, step, rng):
    return swap(directory / f"step_{step:06d}", another(directory, step, rng))


def rename(directory, step, rng):
    name = f"step_{rng.randrange(1001, 9999):06d}"
    (directory / f"step_{step:06d}").rename(directory / name)
    return f"step {step} to {name}"


def edit(directory, step, rng):
    """Another value under one of the keys of meta.json, at any depth."""
    path = directory / f"step_{step:06d}" / "meta.json"
    meta = place = json.loads(path.read_text())
    key = rng.choice(sorted(place))
    while isinstance(place[key], dict) and place[key]:
        place = place[key]
        key = rng.choice(sorted(place))
    place[key] = rng.choice([None, True, 7, "seven", [], {}])
    path.write_text(json.dumps(meta, indent=1))
    return f"{key} = {place[key]!r}"


DAMAGES = {"flip a bit": flip, "truncate": truncate, "empty": empty, "delete": delete, "append": append, "swap files": swap_files,
           "swap ranks": swap_ranks, "swap folders": swap_folders, "rename": rename, "edit JSON": edit}


# -----------------------------------------------------------------------------
# download


def download(base: Path, rounds: int, rng: random.Random, compiled: bool) -> list[str]:
    """Four processes ask for the same three shards of a hub where everything fails first; returns what went wrong."""
    if not HUB.exists():
        sys.exit(f"error: needs the stand-in hub, which is not at {HUB}")
    names = ["shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"]
    faults = ["--fail-first=1", "--truncate-first=1", "--corrupt-first=1", "--slow=4000000"]
    answers = ["503", "200", "206", "200"]  # refused; cut in the middle; the rest, but corrupted; then all of it, once
    folder = base / "base_data" / "climbmix"
    base.mkdir(exist_ok=True)
    log = base / "requests.log"
    hubs = []
    try:
        for options in ([], [*faults, "--verbose"]):
            with open(log, "w") as errors:
                hubs.append(subprocess.Popen([sys.executable, HUB, *options], stdout=subprocess.PIPE, stderr=errors, text=True))
        healthy, faulty = (hub.stdout.readline().strip() for hub in hubs)
        started = time.monotonic()
        command = [sys.executable, "-m", "nanochat.dataset", "-n", "2", "--source", "climbmix"]
        env = environment(base, HF_ENDPOINT=faulty, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
        asking = [subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL) for _ in range(4)]
        codes = [process.wait() for process in asking]
        seconds = time.monotonic() - started
        plain = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        url = f"{healthy}/datasets/karpathy/climbmix-400b-shuffle/resolve/main"
        truth = {name: plain.open(f"{url}/{name}").read() for name in names}
    finally:
        for hub in hubs:
            hub.kill()
            hub.wait()
    wrong = [f"process {i} ended with {code}" for i, code in enumerate(codes) if code]
    print(f"four processes, three files, {' '.join(faults)}: {seconds:.1f} s")
    print(f"{'file':20s} {'MB':>6s} {'whole':>6s}  answers to GET")
    for name in names:
        seen = re.findall(rf'"GET \S*/{name} HTTP/1.1" (\d+)', log.read_text())
        whole = (folder / name).exists() and hashlib.sha256((folder / name).read_bytes()).digest() == hashlib.sha256(truth[name]).digest()
        print(f"{name:20s} {len(truth[name]) / 1e6:6.1f} {'yes' if whole else 'NO':>6s}  {' '.join(seen)}")
        wrong += [] if whole else [f"{name} is not what the hub has"]
        wrong += [] if seen == answers else [f"{name} was answered {seen}; fetched once beyond the faults it would be {answers}"]
    wrong += [f"{path.name} was left behind" for path in folder.glob("*.part*")]
    return wrong


def main(argv=None):
    parser = argparse.ArgumentParser(description="Does anything get lost?", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", choices=["kill", "corrupt", "download"], help="what to do to the program")
    parser.add_argument("--rounds", type=int, default=None, help="kills (none: 60) or corruptions (none: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn at random")
    parser.add_argument("--compile", action="store_true", help="compile the model; every start then takes longer")
    args = parser.parse_args(argv)
    work, rounds = {"kill": (kill, 60), "corrupt": (corrupt, 200), "download": (download, 0)}[args.what]
    base = Path(tempfile.mkdtemp(prefix="nanochat_chaos_"))
    try:
        wrong = work(base, args.rounds or rounds, random.Random(args.seed), args.compile)
    except RuntimeError as error:
        wrong = [str(error)]
    finally:
        for process in survivors(base):
            process.kill()
    if wrong:
        sys.exit("\n".join([f"FAILED ({len(wrong)}), all is in {base}:", *wrong]))
    shutil.rmtree(base)
    print("nothing was lost")


if __name__ == "__main__":
    main()
