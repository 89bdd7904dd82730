"""scripts.chat_web as a program: flags, start and shutdown. Requests are tested in test_server.py."""

import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
import torch
from chat_server import TOKENIZER

from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint
from nanochat.common import Compute, UserError
from scripts.chat_web import listen, main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def base_dir(base_dir, make_random_model):
    model = make_random_model(TOKENIZER, sequence_len=256)
    TOKENIZER.save(base_dir / "tokenizer")
    compute = Compute(torch.device("cpu"), torch.float32)
    save_checkpoint(checkpoint_dir("sft", "d2"), 5, model.state_dict(), None, {"model_config": vars(model.config)}, TOKENIZER, compute)
    return base_dir


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_after_the_running_reply(base_dir, number):
    server = subprocess.Popen(
        [sys.executable, "-m", "scripts.chat_web", "-p", "0", "--device-type", "cpu"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    watchdog = threading.Timer(120, server.kill)
    watchdog.start()
    try:
        line = server.stdout.readline()
        assert line.startswith("ready on http://127.0.0.1:"), line + server.stderr.read()
        body = {"messages": [{"role": "user", "content": "qqqq"}], "max_tokens": 200}
        with httpx.Client(base_url=line.removeprefix("ready on ").strip(), timeout=60) as client:
            assert client.get("/health").json()["model"] == "sft d2 step 5"
            with client.stream("POST", "/chat/completions", json=body) as response:
                lines = response.iter_lines()
                assert "token" in next(lines)
                server.send_signal(number)
                events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        assert events[-1]["done"] and events[-1]["usage"]["completion_tokens"] == 200
        _, log = server.communicate(timeout=60)
        assert server.returncode == 0 and "Traceback" not in log
        assert "200 generated in" in log and "qqqq" not in log
    finally:
        watchdog.cancel()
        server.kill()
        server.wait()


def test_a_port_in_use_is_one_line():
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: .*--port") as caught:
            main(["-p", str(port), "--device-type", "cpu"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments, says", [
    (["-p", "70000"], "argument -p/--port: 70000 is not allowed: must be from 0 to 65535"),
    (["-n", "2"], "--num-gpus is 2"), (["-g", "d99"], "d99.*d2"), (["--host", "no.such.host.example"], "cannot listen on no.such"),
])  # fmt: skip
def test_bad_flags_are_one_line(base_dir, arguments, says, capsys):
    with pytest.raises((UserError, SystemExit)) as caught:
        main(["-p", "0", "--device-type", "cpu", *arguments])
    assert re.search(says, capsys.readouterr().err + str(caught.value))


def test_torchrun_is_refused(base_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        main(["-p", "0", "--device-type", "cpu"])
