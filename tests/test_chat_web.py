"""scripts.chat_web as a program: flags, start and shutdown. Requests are tested in test_server.py."""

import re
import signal
import socket
import sys

import httpx
import pytest
from chat_server import PAGE, events_in, message, program

from nanochat.common import UserError
from scripts.chat_web import listen, main


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_after_the_running_reply(chat_base, number):
    with program("scripts.chat_web", "-p", "0") as server:
        line = server.stdout.readline().decode()
        assert line.startswith("ready on http://127.0.0.1:"), line + server.stderr.read().decode()
        with httpx.Client(base_url=line.removeprefix("ready on ").strip(), timeout=60) as client:
            assert client.get("/health").json()["model"] == "sft d2 step 5"
            assert client.get("/health", headers={"Host": "evil.example"}).status_code == 403
            with client.stream("POST", PAGE, json={"messages": [message("qqqq")], "max_tokens": 200}) as response:
                lines = response.iter_lines()
                assert "token" in next(lines)
                server.send_signal(number)
                events = events_in(lines)
        assert events[-1]["done"] and events[-1]["usage"]["completion_tokens"] == 200
        log = server.communicate(timeout=60)[1].decode()
        assert server.returncode == 0 and "Traceback" not in log
        assert "200 generated in" in log and "qqqq" not in log


def test_a_base_model_is_served_with_a_key_but_does_not_chat(chat_base):
    with program("scripts.chat_web", "-p", "0", "-i", "base", "--api-key", "k3y", "--allow-origin", "https://my.site") as server:
        address = server.stdout.readline().decode().removeprefix("ready on ").strip()
        with httpx.Client(base_url=address, timeout=60, headers={"Authorization": "Bearer k3y", "Origin": "https://my.site"}) as client:
            reply = client.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 5, "logprobs": 1})
            assert [len(choice["logprobs"]["tokens"]) for choice in reply.json()["choices"]] == [5, 5]
            assert reply.headers["access-control-allow-origin"] == "https://my.site"
            assert client.post(PAGE, json={"messages": [message()]}).status_code == 400
            assert client.get("/", headers={"Authorization": ""}).status_code == 401


def test_connections_send_without_delay():
    """Nagle's algorithm would hold each token back until the one before is acknowledged."""
    with listen("127.0.0.1", 0) as sock, socket.create_connection(sock.getsockname()), sock.accept()[0] as accepted:
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("arguments, says", [
    (["-p", "70000"], "argument -p/--port: 70000 is not allowed: must be at most 65535"),
    (["-p", "{taken}"], "port [0-9]+: .*--port"), (["--host", "no.such.host.example"], "cannot listen on no.such"),
    (["-n", "2"], "--num-gpus is 2"), (["-g", "d99"], "d99.*d2"),
    (["--api-key", ""], "'' is not a key"), (["--allow-origin", "my.site"], "'my.site' is not an origin such as https"),
])  # fmt: skip
def test_bad_flags_are_one_line(chat_base, arguments, says, capsys):
    with listen("127.0.0.1", 0) as taken, pytest.raises((UserError, SystemExit)) as caught:
        main(["-p", "0", "--device-type", "cpu", *(text.format(taken=taken.getsockname()[1]) for text in arguments)])
    assert re.search(says, capsys.readouterr().err + str(caught.value)) and "\n" not in str(caught.value)
