"""Other people's clients of OpenAI's API, unmodified, in a virtual environment of their own (build/clients)."""

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from chat_server import ROOT, TOKENIZER, serving, tokens_of
from fake_hub import repositories
from tiny import tiny_gpt

from nanochat.engine import Engine

pytestmark = pytest.mark.slow
PACKAGES = ["litellm", "langchain-openai", "llm", "lm-eval[api]", "transformers"]
ENVIRONMENT = ROOT / "build/clients"


@pytest.fixture(scope="module")
def python():
    """The environment's interpreter; the environment is made once."""
    python, complete = ENVIRONMENT / "bin/python", ENVIRONMENT / "complete"
    if not complete.exists():
        make = [sys.executable, "-m", "venv", "--clear", ENVIRONMENT]
        for command in (make, [python, "-m", "pip", "install", "-q", *PACKAGES]):
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"the clients could not be installed: {(made.stdout + made.stderr).strip()[-200:]}")
        complete.touch()
    return str(python)


@pytest.fixture
def run(python, tmp_path):
    """`run(site, arguments)` runs the interpreter with the server's address in $URL, and returns what it prints."""

    def run(site, arguments: list[str]) -> str:
        folders = {"LLM_USER_PATH": str(tmp_path), "HF_HOME": str(tmp_path)}
        env = {**os.environ, **folders, "URL": f"{site.address}/v1", "HF_HUB_OFFLINE": "1"}
        result = subprocess.run([python, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    return run


LITELLM = """
import os, litellm
settings = {"model": "openai/nanochat", "api_base": os.environ["URL"], "api_key": "none"}
settings["messages"] = [{"role": "user", "content": "hi"}]
print(litellm.completion(**settings).choices[0].message.content)
print("".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**settings, stream=True)))
"""
LANGCHAIN = """
import os
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
chat = ChatOpenAI(model="nanochat", base_url=os.environ["URL"], api_key="none")
print(chat.invoke([SystemMessage("a"), HumanMessage("b"), HumanMessage("c")]).content)
call = AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}])
print(chat.invoke([HumanMessage("a"), call, ToolMessage("4", tool_call_id="1")]).content)
print("".join(chunk.content for chunk in chat.stream("hi")))
print("".join(token["token"] for token in chat.bind(logprobs=True).invoke("hi").response_metadata["logprobs"]["content"]))
"""


def test_litellm(run, site):
    assert run(site, ["-c", LITELLM]).split() == ["hello"] * 2


def test_langchain(run, site):
    assert run(site, ["-c", LANGCHAIN]).split() == ["hello"] * 4
    prompts = [TOKENIZER.decode(prompt) for prompt in site.engine.prompts]
    assert "<|bos|><|user_start|>a\n\nb\n\nc<|user_end|><|assistant_start|>" in prompts
    assert any("<|assistant_start|>f({})<|assistant_end|><|user_start|>4<|user_end|>" in prompt for prompt in prompts)


def test_llm(run, site, tmp_path):
    models = [{"model_id": "mine", "model_name": "nanochat", "api_base": f"{site.address}/v1"}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    for flags in ([], ["--no-stream", "-s", "Be brief."]):
        assert run(site, ["-m", "llm", "-m", "mine", "--key", "none", *flags, "hi"]).strip() == "hello"


# A tokenizer of transformers whose tokens are ours, and an evaluation that prints what each choice's log-probability is
LM_EVAL = r"""
import json, os, sys
import lm_eval
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
tokenizer = Tokenizer(models.BPE({character: byte for byte, character in bytes_to_unicode().items()}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer.decoder = decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!", pad_token="!").save_pretrained("tokenizer")
kind, url = sys.argv[1:]
settings = {"model": "nanochat", "base_url": os.environ["URL"] + url, "num_concurrent": 1}
if kind == "local-completions":
    settings |= {"tokenizer": "tokenizer", "tokenizer_backend": "huggingface", "batch_size": 4}
results = lm_eval.simple_evaluate(kind, settings, tasks=["rows"], task_manager=TaskManager(include_path="."),
                                  apply_chat_template=kind == "local-chat-completions", bootstrap_iters=0)
print(json.dumps([results["results"]["rows"]["acc,none" if kind == "local-completions" else "exact_match,none"],
                  [sample["resps"] for sample in results["samples"]["rows"]]]))
"""


def lm_eval(run, site, folder, kind: str, url: str, task: dict):
    """(the score, the responses to each row) of a task on the rows of ARC-Easy."""
    (folder / "rows.parquet").write_bytes(repositories()["allenai/ai2_arc"]["ARC-Easy/test-00000-of-00001.parquet"])
    common = {"task": "rows", "dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.parquet")}},
              "test_split": "test", "doc_to_text": "Question: {{question}}\nAnswer:"}  # fmt: skip
    (folder / "rows.yaml").write_text(json.dumps({**common, **task}))
    return json.loads(run(site, ["-c", LM_EVAL, kind, url]).splitlines()[-1])


def test_lm_eval_generates(run, site, tmp_path):
    generation = {"until": ["\n\n", "?"], "max_gen_toks": 20}
    task = {"output_type": "generate_until", "doc_to_target": "hello", "generation_kwargs": generation,
            "metric_list": [{"metric": "exact_match"}]}  # fmt: skip
    score, responses = lm_eval(run, site, tmp_path, "local-chat-completions", "/chat/completions", task)
    assert score == 1 and responses == [[["hello"]]] * 40


def test_lm_eval_scores_the_choices_of_arc_as_our_logits_do(run, tmp_path):
    model = tiny_gpt(vocab_size=TOKENIZER.get_vocab_size(), sequence_len=400, head_std=0.3)
    task = {"output_type": "multiple_choice", "doc_to_choice": "{{choices.text}}",
            "doc_to_target": "{{choices.label.index(answerKey)}}"}  # fmt: skip
    with serving(Engine(model, TOKENIZER), name="base d2 step 8") as site:
        accuracy, responses = lm_eval(run, site, tmp_path, "local-completions", "/completions", task)
    right = 0
    for row, choices in zip(pq.read_table(tmp_path / "rows.parquet").to_pylist(), responses, strict=True):
        expected = []
        for choice in row["choices"]["text"]:
            context, ids = (tokens_of(f"Question: {row['question']}\nAnswer:{end}") for end in ("", f" {choice}"))
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).log_softmax(-1)[0]
            expected.append(sum(log_probs[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
        assert [log_prob for ((log_prob, _),) in choices] == pytest.approx(expected, abs=1e-3)
        right += expected.index(max(expected)) == row["choices"]["label"].index(row["answerKey"])
    assert accuracy == pytest.approx(right / 40) and 0 < right < 40
