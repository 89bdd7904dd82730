"""A small fake of the Hugging Face hub and of the server of the two plain files, on loopback.

It serves a handful of made-up rows in the columns of the real data sets to the real clients
(`datasets`, `huggingface_hub`, urllib), and can answer with faults.
"""

import hashlib
import io
import itertools
import json
import re
import threading
import zipfile
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40
CORE_TASKS = {  # label -> (icl_task_type, random baseline in percent, continuation delimiter, rows)
    "questions": ("multiple_choice", 25, "\nAnswer: ", [
        {"query": f"Question: what is {i} + 1?", "choices": [str(i), str(i + 1), "no", "yes"], "gold": 1} for i in range(12)]),
    "pronouns": ("schema", 50, " ", [
        {"context_options": [f"Box {i} is large because it", f"Bag {i} is small because it"], "continuation": f"holds {i} apples.", "gold": i % 2}
        for i in range(12)]),
    "facts": ("language_modeling", 0, " ", [{"context": f"The number after {i} is", "continuation": str(i + 1)} for i in range(12)]),
}  # fmt: skip


def parquet(rows: list[dict]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=16)
    return buffer.getvalue()


def dataset(files: dict[str, list[dict]]) -> dict[str, bytes]:
    """Files of a data set: "CONFIG/SPLIT" -> rows, with the card that names configs and splits."""
    configs: dict[str, list[dict]] = {}
    for name in files:
        config, split = name.split("/")
        configs.setdefault(config, []).append({"split": split, "path": f"{name}-*"})
    card = {"configs": [{"config_name": config, "data_files": splits} for config, splits in configs.items()]}
    data = {f"{name}-00000-of-00001.parquet": parquet(rows) for name, rows in files.items()}
    return {"README.md": f"---\n{json.dumps(card)}\n---\n".encode(), **data}  # JSON is YAML


@lru_cache(maxsize=None)
def repositories() -> dict[str, dict[str, bytes]]:
    """{data set id: {file name: content}}, generated once."""
    numbers = range(40)
    shards = {
        f"shard_{n:05d}.parquet": parquet([{"text": f"Document {n}.{i}: the sum of {i} and {n} is {i + n}. " * (1 + i % 5)} for i in range(60)])
        for n in (0, 1, 2)
    }
    arc = [{"id": str(i), "question": f"What is {i} plus {i}?", "choices": {"text": [str(2 * i + k) for k in range(4)], "label": list("ABCD" if i % 4 else "1234")},
            "answerKey": "A" if i % 4 else "1"} for i in numbers]  # fmt: skip
    mmlu = [{"question": f"Which is {i}?", "subject": "numbers", "choices": [str(i + k) for k in range(4)], "answer": i % 4} for i in numbers]
    gsm = [{"question": f"Ann has {i} pens and buys 3. How many?", "answer": f"She has {i}+3=<<{i}+3={i + 3}>>{i + 3} pens.\n#### {i + 3}"} for i in numbers]
    smol = [{"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}."}], "source": "fake"} for i in numbers]
    human = [{"task_id": f"HumanEval/{i}", "prompt": f'def add{i}(x):\n    """x plus {i}."""\n', "canonical_solution": f"    return x + {i}\n",
              "test": f"def check(candidate):\n    assert candidate(1) == {i + 1}\n", "entry_point": f"add{i}"} for i in range(6)]  # fmt: skip
    return {
        "karpathy/climbmix-400b-shuffle": {**shards, "shard_06542.parquet": shards["shard_00002.parquet"]},
        "allenai/ai2_arc": dataset({f"{c}/{s}": arc for c in ("ARC-Easy", "ARC-Challenge") for s in ("train", "validation", "test")}),
        "cais/mmlu": dataset({
            **{f"all/{split}": mmlu for split in ("test", "validation", "dev")},
            "auxiliary_train/train": [{"train": {**row, "subject": ""}} for row in mmlu],  # one struct column, as on the real hub
        }),
        "openai/gsm8k": dataset({f"main/{split}": gsm for split in ("train", "test")}),
        "openai/openai_humaneval": dataset({"openai_humaneval/test": human}),
        "HuggingFaceTB/smol-smoltalk": dataset({f"default/{split}": smol for split in ("train", "test")}),
        "fake/trouble": dataset({"default/test": [{"unique": 1}]}),  # for tests of faults; its content is in no cache
    }  # fmt: skip


@lru_cache(maxsize=None)
def plain_files() -> dict[str, bytes]:
    words = "\r\n".join("".join(letters) for letters in itertools.product(("straw", "blue", "elder"), ("berry", "bird", "tree"), "abcdefghijklm", "nopqrstuvwxyz"))
    tasks = [{"label": label, "dataset_uri": f"{label}.jsonl", "num_fewshot": [2], "icl_task_type": kind, "continuation_delimiter": delimiter}
             for label, (kind, _, delimiter, _) in CORE_TASKS.items()]  # fmt: skip
    bundle = io.BytesIO()
    with zipfile.ZipFile(bundle, "w") as archive:
        archive.writestr("eval_bundle/core.yaml", json.dumps({"icl_tasks": tasks}))  # JSON is YAML
        baselines = "".join(f"{label},{percent}\n" for label, (_, percent, _, _) in CORE_TASKS.items())
        archive.writestr("eval_bundle/eval_meta_data.csv", "Eval Task,Random baseline\n" + baselines)
        for label, (*_, rows) in CORE_TASKS.items():
            archive.writestr(f"eval_bundle/eval_data/{label}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return {"words_alpha.txt": words.encode(), "eval_bundle.zip": bundle.getvalue()}


class FakeHub(ThreadingHTTPServer):
    """Records the paths of its downloads in `requests`.

    `faults` maps a pattern of paths to the faults of their next downloads: an HTTP status, "cut", "corrupt" or other bytes.
    """

    daemon_threads = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.faults: dict[str, list[int | str | bytes]] = {}
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def next_fault(self, path: str):
        for pattern, faults in self.faults.items():
            if faults and re.search(pattern, path):
                return faults.pop(0)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # a connection per request, so that none outlives its server

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        if match := re.fullmatch(r"/files/([^/]+)", path):
            return self.send_file(path, plain_files().get(match[1]))
        match = re.fullmatch(r"(/api)?/datasets/([\w.-]+/[\w.-]+)(?:/([\w-]+)(?:/([^/]+)(?:/(.*))?)?)?", path)
        files = repositories().get(match[2]) if match else None
        if files is None:
            return self.send_json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        api, repo, verb, _, name = match.groups()
        if not api and verb == "resolve":
            return self.send_file(path, files.get(name))
        if verb in (None, "revision"):
            siblings = [{"rfilename": file} for file in files]
            flags = {"private": False, "gated": False, "disabled": False, "tags": []}
            return self.send_json({"id": repo, "sha": COMMIT, "siblings": siblings, **flags})
        if verb == "tree":
            prefix = f"{name}/" if name else ""
            inside = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
            entries = dict.fromkeys(prefix + file.split("/")[0] for file in inside)  # files and folders, each once
            return self.send_json([entry(file, files.get(file)) for file in entries])
        self.send_json({"error": "Not found"}, 404)

    def send_json(self, value, status: int = 200, headers: dict | None = None):
        self.send_bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send_file(self, path: str, data: bytes | None):
        fault = None
        if self.command == "GET":
            self.server.requests.append(path)
            fault = self.server.next_fault(path)
        if data is None:
            return self.send_json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        if isinstance(fault, int):
            return self.send_json({"error": "fault"}, fault, {"Retry-After": "0"})
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        content = {"corrupt": bytes(len(data)), "cut": data, None: data}.get(fault, fault)
        self.send_bytes(content, 200, headers, cut=fault == "cut")

    def send_bytes(self, data: bytes, status: int, headers: dict, cut: bool = False):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)


def entry(name: str, data: bytes | None) -> dict:
    """How the API describes a file, or a folder (no data)."""
    if data is None:
        return {"type": "directory", "path": name, "size": 0, "oid": COMMIT}
    digest, size = hashlib.sha256(data).hexdigest(), len(data)
    lfs = {"oid": digest, "size": size, "pointerSize": 134}
    return {"type": "file", "path": name, "size": size, "oid": digest[:40], "lfs": lfs}
