"""Talk to a model in the browser, or through OpenAI's API.

    python -m scripts.chat_web                  # the newest fine-tuned model on http://127.0.0.1:8000
    python -m scripts.chat_web -n 8             # a copy of it on each of eight GPUs
    python -m scripts.chat_web --host 0.0.0.0   # for everybody who can reach this machine; there are no passwords

`/` is a page to chat on, `/v1` is for OpenAI's clients (any API key will do), `/health` and `/stats` tell how
things are, `/openapi.json` describes them all. Ctrl-C lets the answers that are being written come to their end.
What is said is not written to the log unless --log-content is given.
"""

import argparse
from pathlib import Path

from nanochat.common import UserError, compute_init, ranks, run_script, share_cores

GRACE = 30.0  # seconds that answers get to come to their end when the server is stopped
PAGE = Path(__file__).resolve().parents[1] / "nanochat"


def parse_args(argv):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=formatter)
    parser.add_argument("-n", "--num-gpus", type=int, default=1, help="GPUs to use, each with a copy of the model")
    parser.add_argument("-p", "--port", type=int, default=8000, help="where to listen; 0: any port that is free")
    parser.add_argument("--host", default="127.0.0.1", help="which address to listen on; 0.0.0.0: all of this machine's")
    parser.add_argument("-i", "--stage", default="sft", choices=["mid", "sft", "rl"], help="the model's stage")
    parser.add_argument("-g", "--model-tag", help="which model of that stage; None: the newest")
    parser.add_argument("-s", "--step", type=int, help="which checkpoint; None: the last")
    parser.add_argument("-t", "--temperature", type=float, default=0.8, help="where a request names none, 0 to 2")
    parser.add_argument("-k", "--top-k", type=int, default=50, help="where a request names none; 0 for all tokens")
    parser.add_argument("-m", "--max-tokens", type=int, default=512, help="length of an answer where a request names none")
    parser.add_argument("--max-sequences", type=int, help="replies generated at once on each device (default: the engine's choice)")
    parser.add_argument("--max-queue", type=int, default=64, help="answers that may wait for each device before requests are refused")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu; empty: the best there is")
    parser.add_argument("--log-content", action="store_true", help="write what is said to the log, too")
    args = parser.parse_args(argv)
    for name, low, high in (("num_gpus", 1, 1024), ("port", 0, 65535), ("temperature", 0, 2), ("top_k", 0, 200),
                            ("max_tokens", 1, 4096), ("max_sequences", 1, 1024), ("max_queue", 0, 100_000)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be from {low} to {high}")
    return args


# -----------------------------------------------------------------------------
# The app


def make_app(workers, name: str, temperature: float = 0.8, top_k: int = 50, max_tokens: int = 512):
    """The FastAPI app. `workers` are serving.Workers that have been started, `name` is what the model is called."""
    import time

    from fastapi import FastAPI
    from fastapi.responses import JSONResponse, Response

    from nanochat import openai_api, page_api
    from nanochat.web import PAGE_HEADERS, BodyLimit, handle_errors

    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(BodyLimit)
    handle_errors(app)
    defaults = {"temperature": temperature, "top_k": top_k, "max_tokens": max_tokens}
    page_api.add_routes(app, workers, defaults)
    openai_api.add_routes(app, workers, name, defaults)
    page, logo = (PAGE / "ui.html").read_bytes(), (PAGE / "logo.svg").read_bytes()
    started = time.monotonic()

    @app.get("/", include_in_schema=False)
    async def root():
        return Response(page, media_type="text/html", headers=PAGE_HEADERS)

    @app.get("/logo.svg", include_in_schema=False)
    async def image():
        return Response(logo, media_type="image/svg+xml", headers=PAGE_HEADERS)

    @app.get("/health")
    async def health():
        failing = any(thread.failing for thread in workers.threads)
        status = "shutting down" if workers.closing else "failing" if failing else "ok"
        running = sum(thread.active - thread.waiting for thread in workers.threads)
        waiting = sum(thread.waiting for thread in workers.threads)
        report = {"status": status, "ready": status == "ok", "model": name, "context": workers.context,
                  "running": running, "waiting": waiting, "defaults": defaults}
        return JSONResponse(report, 200 if status == "ok" else 503)

    @app.get("/stats")
    async def stats():
        counts, engines = workers.counts(), [thread.engine for thread in workers.threads]
        return {
            "uptime_s": round(time.monotonic() - started, 1),
            **{key: counts[key] for key in ("requests", "completed", "cancelled", "failed")},
            "rejected": workers.rejected,
            "generated_tokens": sum(engine.generated_tokens for engine in engines),
            "prefill_tokens": sum(engine.prefill_tokens for engine in engines),
            "cached_tokens": sum(engine.cached_tokens for engine in engines),
            # What the engines themselves say, not what we believe of them: a leak would show here.
            "workers": [{"device": thread.device, "running": thread.engine.num_running, "waiting": thread.engine.num_waiting,
                         "rows": thread.engine.max_sequences} for thread in workers.threads],
        }

    return app


# -----------------------------------------------------------------------------
# The process


def listen(host: str, port: int):
    """A socket bound to the address, before a model is loaded."""
    import socket

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port or --host") from error
    return sock


def make_server(app, workers, sock, grace: float = GRACE):
    """A uvicorn server that, once it is to stop, refuses what is new with 503 and lets answers come to their end."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            host, port = sock.getsockname()[:2]
            print(f"ready on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

        def handle_exit(self, sig, frame):
            self.force_exit = self.should_exit  # asked a second time: at once
            self.should_exit = True

        async def shutdown(self, sockets=None):
            await workers.drain(grace, hurry=lambda: self.force_exit)
            await super().shutdown(sockets)

    # Clients close idle connections after some seconds; the server must be more patient than they are.
    config = uvicorn.Config(app, lifespan="off", ws="none", log_config=None, log_level="warning", access_log=False,
                            server_header=False, timeout_keep_alive=75, timeout_graceful_shutdown=5)  # fmt: skip
    return Server(config)


def make_workers(args):
    """(workers, the model's name): for each device a thread that will load the model there and run an engine."""
    from dataclasses import replace
    from functools import partial

    share_cores()
    import torch

    from nanochat.checkpoint_manager import load_model, resolve_checkpoint
    from nanochat.device import prepare_for_inference
    from nanochat.engine import Engine
    from nanochat.serving import EngineThread, Workers

    def make_engine(device):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        model, tokenizer, _ = load_model(args.stage, replace(compute, device=device), directory.name, step)
        return Engine(prepare_for_inference(model), tokenizer, **({} if args.max_sequences is None else {"max_sequences": args.max_sequences}))

    if ranks()[2] > 1:
        raise UserError("chat_web is one process for all GPUs; start it without torchrun, and with -n GPUS")
    compute = compute_init(args.device_type)
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if compute.device.type == "cuda" else [compute.device]
    if args.num_gpus > len(devices):
        kind = compute.device.type
        raise UserError(f"--num-gpus is {args.num_gpus}, but there is only {len(devices)} x {kind} here; ask for as many at most")
    directory, step = resolve_checkpoint(args.stage, args.model_tag, args.step)
    threads = [
        EngineThread(partial(make_engine, device), str(device), args.max_queue, args.log_content)
        for device in devices[: args.num_gpus]
    ]
    return Workers(threads), f"{args.stage} {directory.name} step {step}"


def main(argv=None):
    args = parse_args(argv)
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with listen(args.host, args.port) as sock:
        workers, name = make_workers(args)
        try:
            workers.start()
            make_server(make_app(workers, name, args.temperature, args.top_k, args.max_tokens), workers, sock).run(sockets=[sock])
        finally:
            workers.stop()


if __name__ == "__main__":
    run_script(main)
