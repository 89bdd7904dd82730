"""What the sandbox costs: the 164 canonical solutions of HumanEval on all cores, and the start of an empty program.

    python -m dev.bench.humaneval

The solutions must score 164; the data set comes from the hub that HF_ENDPOINT names. A start is compared with that
of a bare interpreter, layer by layer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor


def main(argv=None):
    parser = argparse.ArgumentParser(description="The sandbox.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("-n", "--starts", type=int, default=50, help="starts of each kind")
    parser.add_argument("--allow-unsafe-code", action="store_true", help="also where layers are missing")
    args = parser.parse_args(argv)

    from nanochat.execution import LAYERS, active_layers, execute_code
    from tasks.humaneval import HumanEval

    task = HumanEval(allow_unsafe=args.allow_unsafe_code)
    conversations, cores = list(task), os.cpu_count() or 1
    print(f"layers: {', '.join(active_layers())}")

    def loop_seconds():  # what our own work takes: it must not be slower for what went on before
        started = time.perf_counter()
        sum(number * number for number in range(2_000_000))
        return time.perf_counter() - started

    def evaluate(conversation):
        started = time.perf_counter()
        passed = task.evaluate(conversation, conversation["messages"][-1]["content"])
        return passed, time.perf_counter() - started

    before, started = loop_seconds(), time.perf_counter()
    with ThreadPoolExecutor(cores) as pool:
        results = list(pool.map(evaluate, conversations))
    seconds = time.perf_counter() - started
    times = sorted(1000 * took for _, took in results)
    print(f"{sum(passed for passed, _ in results)} of {len(results)} canonical solutions pass, {seconds:.1f} s on {cores} cores; "
          f"each {statistics.median(times):.0f} ms (median), at most {times[-1]:.0f} ms")
    print(f"a fixed loop of our own: {1000 * before:.0f} ms before, {1000 * loop_seconds():.0f} ms after")

    bare = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", "pass"]
    kinds = {"bare interpreter": lambda: subprocess.run(bare, check=True)}
    for layers in (("limits",), LAYERS[1:], LAYERS):
        kinds[", ".join(layers)] = lambda layers=layers: execute_code("pass", allow_unsafe=True, layers=layers)
    times = {kind: [] for kind in kinds}
    for _ in range(args.starts):  # in turns, so that what else the machine does meets all alike
        for kind, start in kinds.items():
            started = time.perf_counter()
            start()
            times[kind].append(1000 * (time.perf_counter() - started))
    for kind, took in times.items():
        print(f"{kind:40s} {statistics.median(took):5.1f} ms (median), {min(took):5.1f} ms (least)")


if __name__ == "__main__":
    main()
