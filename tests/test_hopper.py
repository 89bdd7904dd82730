"""What can be known of a Hopper GPU without one: kernels compiled for it, and the compiled step on a CUDA device that does nothing."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


COMPILE = """
import subprocess, sys, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nanochat.decode_attention import BLOCK, kernels

group, dtype, cubin = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
constants = {"KV_HEADS": 10 // group, "GROUP": group, "G": group, "D": 128, "BLOCK": max(16, BLOCK // group), "PARTS": 32}
types = {"seqlens": "*i32", "rows": "*i32", "out": "*fp32", "stats": "*fp32", "scale": "fp32", **dict.fromkeys(constants, "constexpr")}
types |= dict.fromkeys(["q", "k_new", "v_new", "k_cache", "v_cache", "y"], f"*{dtype}")
for kernel in kernels():
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(kernel, {name: types.get(name, "i32") for name in kernel.arg_names}, used)
    cubin.write_bytes(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"])
    subprocess.run([Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "--dump-resource-usage", cubin], check=True)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which PyTorch for CUDA brings along")
@pytest.mark.parametrize("group, dtype", [("1", "bf16"), ("4", "bf16"), ("1", "fp32")])
def test_decode_attention_compiles_for_hopper_without_spilling_registers(tmp_path, group, dtype):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, group, dtype, tmp_path / "cubin"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+) .*LOCAL:(\d+) ", done.stdout) == [("attend", "0", "0"), ("combine", "0", "0")]


STEPS = """
import ctypes, json, torch
from dev.bench.engine import decoding_engine
from dev.bench.train import build
from nanochat import engine, flash_attention
from nanochat.common import compute_init
from nanochat.device import compile_model
from nanochat.optim import MuonAdamW
from nanochat.training import train_step

fake = ctypes.CDLL("libcuda.so.1")
def events(*names): return sum(fake.fake_count(name.encode()) for name in names)
SYNCS = "SYNC cudaStreamSynchronize", "SYNC cudaDeviceSynchronize", "SYNC cudaEventSynchronize", "MEMCPY D2H sync", "MEMCPY D2H pageable sync"
compute = compute_init("cuda")
model, found = build(4, 512, 49152, compute.device, compute.dtype), {}
heads = 2, 2, 128
flash_attention._chosen = {
    (compute.device, compute.dtype, heads, flash_attention.WHOLE, None): ("aten", flash_attention.aten),
    (compute.device, compute.dtype, heads, flash_attention.CACHE, None): ("triton", flash_attention._triton_cached),
}  # their self tests would see only zeros
compiled, optimizer = compile_model(model, compute), MuonAdamW(model.param_groups())
ids = torch.zeros(4, 512, dtype=torch.int32, device="cuda")
counters = torch._dynamo.utils.counters
for step in range(3):
    fake.fake_reset()
    before = counters["frames"]["ok"]
    train_step(compiled, optimizer, [(ids, ids.long())], compute, count=2048)
found["frames"], found["graph breaks"] = counters["frames"]["ok"] - before, sum(counters["graph_break"].values())
found["syncs"], found["refused"] = events(*SYNCS), events("ERROR")
running = decoding_engine(model.eval(), 4, 16, seed=0, temperature=0.8, compiled=True)
fake.fake_reset()
with torch.inference_mode():
    engine.DecodingGraph(running, 4)  # two warm-up steps and the capture, all of the same kernels
found["nodes"] = events("KERNEL", "GEMM") / 3
fake.fake_reset()
running.step()
found["step"] = {"launches": events("KERNEL"), "graphs": events("GRAPH launch"), "syncs": events(*SYNCS), "refused": events("ERROR")}
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif("FAKEGPU_HOME" not in os.environ, reason="needs FAKEGPU_HOME: lib/libcuda.so.1, a fake CUDA driver, and venv/, PyTorch 2.11 for CUDA")
def test_the_compiled_step_and_decoding_on_a_device_that_does_nothing():
    home = Path(os.environ["FAKEGPU_HOME"])
    env = {**os.environ, "LD_PRELOAD": f"{home}/lib/libcuda.so.1", "LD_LIBRARY_PATH": f"{home}/lib", "TRITON_LIBCUDA_PATH": f"{home}/lib",
           "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCH_COMPILE_DISABLE": "0", "NANOCHAT_DTYPE": "bfloat16"}  # fmt: skip
    done = subprocess.run([home / "venv/bin/python", "-c", STEPS], env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    step = found.pop("step")
    assert found.pop("nodes") <= 4 * 14 + 12
    assert found == {"frames": 0, "graph breaks": 0, "syncs": 0, "refused": 0}, "after two steps nothing is compiled, nothing waits"
    assert step.pop("launches") <= 40 and step == {"graphs": 1, "syncs": 2, "refused": 0}
