"""Talk to a model in the browser, or through OpenAI's API.

    python -m scripts.chat_web                  # the newest fine-tuned model on http://127.0.0.1:8000
    python -m scripts.chat_web -n 8             # a copy of it on each of eight GPUs
    python -m scripts.chat_web -i base          # a base model, which does not chat: only /v1/completions
    python -m scripts.chat_web --host 0.0.0.0 --api-key KEY   # for other machines; without a key, for everyone there

`/` is a chat page, `/v1` is for OpenAI's clients (without --api-key, with any key), `/health` and `/stats` show the
server's state, and `/openapi.json` describes all routes. Ctrl-C waits for running replies. The log holds no conversations.
"""

import argparse
import gc
import logging
import re
import socket
import time
from dataclasses import replace
from functools import partial
from ipaddress import ip_address

from nanochat import flags
from nanochat.common import UserError, compute_init, raise_file_limit, run_script

HEADER_TIMEOUT = 10  # seconds after a client has connected, in which the header of its first request must arrive
KEEP_ALIVE = 75  # seconds until the next one. Clients close idle connections sooner


def parse_args(argv):
    parser = flags.make_parser(__doc__)
    flags.add_model_flags(parser, ["base", "mid", "sft", "rl"])
    group = parser.add_argument_group("server")
    group.add_argument("-n", "--num-gpus", type=flags.COUNT, default=1, help="GPUs to use, each with a copy of the model")
    group.add_argument("-p", "--port", type=flags.number(int, 0, 65535), default=8000, help="port; 0 for any free one")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all addresses of this machine")
    group.add_argument("--max-sequences", type=flags.COUNT, default=64, help="replies generated at once on each device, if they fit")
    group.add_argument("--max-queue", type=flags.number(int, 0), default=64, help="replies that may wait for each device")
    group.add_argument("--api-key", type=KEY, help="what clients must send as API key, and browsers as password (default: none)")
    group.add_argument("--allow-origin", type=ORIGIN, action="append", default=[], metavar="URL",
                       help="web site whose pages may use the API, or *; repeatable (this machine's always may)")  # fmt: skip
    flags.add_sampling_flags(parser, temperature=0.8)  # of requests that do not set them
    return parser.parse_args(argv)


def matching(pattern: str, what: str):
    """A type for argparse: a text of this form."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return text

    return parse


KEY = matching(r"[!-~]+", "a key: it must consist of visible ASCII characters")
ORIGIN = matching(r"https?://[^/\sA-Z]+|\*", "an origin such as https://example.com or http://10.0.0.5:3000")


def listen(host: str, port: int):
    """A socket that listens on the address, before a model is loaded."""
    try:
        sock = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port or --host") from error
    # Connections inherit it: without it each token would wait until the client has acknowledged the one before, for 40 ms
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host.lower()


def own_names(host: str, sock) -> set[str]:
    """The names of a server that only this machine can reach; empty for others, whose names we do not know."""
    return {"localhost", "127.0.0.1", "[::1]", in_url(host)} if ip_address(sock.getsockname()[0]).is_loopback else set()


def close_idle(connections, seen: dict, limit: int) -> dict:
    """Close connections whose next request has not begun in time and, beyond `limit`, those that are idle the longest.

    `seen` is what the last call returned: connection -> (its last request, when that was last seen running).
    """
    now = time.monotonic()

    def last_seen(connection):
        request, _ = known = seen.get(connection, (None, now))
        running = connection.cycle and not connection.cycle.response_complete
        return (connection.cycle, now) if running or connection.cycle is not request else known

    seen = {connection: last_seen(connection) for connection in connections}
    for number, connection in enumerate(sorted(seen, key=lambda connection: seen[connection][1])):
        idle = now - seen[connection][1]  # seconds; 0 while a request is running
        timeout = KEEP_ALIVE if connection.cycle else HEADER_TIMEOUT
        if idle > timeout or idle > 0 and number < len(seen) - limit:
            connection.transport.abort()
    return seen


def make_server(app, pool, sock, grace: float = 30.0):
    """A uvicorn server that, when stopped, refuses new requests and waits `grace` seconds for the running replies."""
    import uvicorn

    limit = raise_file_limit()

    class Server(uvicorn.Server):
        seen: dict = {}

        async def on_tick(self, counter):  # ten times a second
            if counter % 10 == 0:
                self.seen = close_idle(self.server_state.connections, self.seen, limit)
            return await super().on_tick(counter)

        async def startup(self, sockets=None):
            await super().startup(sockets)
            host, port = sock.getsockname()[:2]
            print(f"ready on http://{in_url(host)}:{port}", flush=True)

        def handle_exit(self, sig, frame):
            self.force_exit = self.should_exit  # the second signal: at once
            self.should_exit = True

        async def shutdown(self, sockets=None):
            await pool.drain(grace, hurry=lambda: self.force_exit)
            await super().shutdown(sockets)

    config = uvicorn.Config(app, lifespan="off", ws="none", log_config=None, log_level="warning", access_log=False,
                            server_header=False, timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=5)  # fmt: skip
    return Server(config)


def make_pool(args):
    """(pool, model name, examples): for each device a thread that will load the model there and run an engine."""
    import torch

    from nanochat.checkpoint_manager import load_model, resolve_checkpoint, verify
    from nanochat.engine import Engine
    from nanochat.engine_thread import EngineThread, Pool

    def make_engine(device):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        model, tokenizer, _ = load_model(args.stage, replace(compute, device=device), directory.name, step)
        engine = Engine(model.to(compute.dtype), tokenizer, max_sequences=args.max_sequences, compiled=True)
        if device.type == "cuda":  # compile now, for one sequence and for several, and not at the first requests
            print(f"{device}: compiling, which takes a minute or so the first time", flush=True)
            for n in (1, 2):
                engine.generate_batch([tokenizer.get_bos_token_id()], n, max_tokens=1)
        return engine

    compute = compute_init(args.device_type)
    devices = [compute.device]
    if compute.device.type == "cuda":
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if args.num_gpus > len(devices):
        raise UserError(f"--num-gpus is {args.num_gpus}, but this machine has {len(devices)} {compute.device.type} device(s)")
    directory, step = resolve_checkpoint(args.stage, args.model_tag, args.step)
    examples = verify(directory, step, names=[]).get("user_config", {}).get("examples", [])
    threads = [EngineThread(partial(make_engine, device), str(device), args.max_queue) for device in devices[: args.num_gpus]]
    return Pool(threads), f"{args.stage} {directory.name} step {step}", examples


def main(argv=None):
    args = parse_args(argv)
    from nanochat.server import make_app

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with listen(args.host, args.port) as sock:
        pool, name, examples = make_pool(args)
        try:
            pool.start()
            app = make_app(pool, name, args.temperature, args.top_k, args.max_tokens, examples,
                           own_names(args.host, sock), args.allow_origin, args.api_key)  # fmt: skip
            gc.freeze()  # otherwise a large body of small lists makes the collector search all modules again and again
            make_server(app, pool, sock).run(sockets=[sock])
        finally:
            pool.stop()


if __name__ == "__main__":
    run_script(main)
