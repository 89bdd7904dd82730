"""The terminal chat: memory, whole characters, a context that fills up, Ctrl-C in a real process, mistakes."""

import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint
from nanochat.common import Compute, UserError
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer
from scripts.chat_cli import Chat, main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tokenizer():
    """Every byte is a token; nothing is merged."""
    specials = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
    return RustBPETokenizer({bytes([i]): i for i in range(256)}, SPLIT_PATTERN, specials)


class Parrot:
    """A fake for the engine that says what it is told to and notes what it was asked."""

    def __init__(self, tokenizer, replies, context=200):
        self.tokenizer, self.replies = tokenizer, list(replies)
        self.model = SimpleNamespace(config=SimpleNamespace(sequence_len=context))
        self.end = tokenizer.encode_special("<|assistant_end|>")
        self.terminal_tokens = {self.end, tokenizer.get_bos_token_id()}
        self.prompts, self.seeds = [], []

    def generate(self, tokens, max_tokens, temperature, top_k, seed):
        self.prompts.append(self.tokenizer.decode(tokens))
        self.seeds.append(seed)
        reply = self.replies.pop(0)
        for token in (self.tokenizer.encode(reply) if isinstance(reply, str) else reply)[:max_tokens]:
            yield [token], [1]
        if len(reply) > max_tokens:
            return ["length"]
        yield [self.end], [1]
        return ["stop"]


def chat_with(tokenizer, replies, raw=False, context=200, max_tokens=50):
    return Chat(Parrot(tokenizer, replies, context), raw, max_tokens, temperature=0.6, top_k=50)


def turn(user, assistant=None):
    answer = "" if assistant is None else f"{assistant}<|assistant_end|>"
    return f"<|user_start|>{user}<|user_end|><|assistant_start|>{answer}"


# -----------------------------------------------------------------------------
# A conversation


def test_it_remembers_and_clear_forgets(tokenizer):
    chat = chat_with(tokenizer, ["one", "two", "three"])
    assert "".join(chat.ask("a")) == "one"
    assert "".join(chat.ask("b")) == "two"
    chat.turns.clear()
    assert "".join(chat.ask("c")) == "three"
    first, second, third = chat.engine.prompts
    assert first == "<|bos|>" + turn("a")
    assert second == "<|bos|>" + turn("a", "one") + turn("b")
    assert third == "<|bos|>" + turn("c")
    assert len(set(chat.engine.seeds)) == 3  # asking again may give another answer


def test_what_it_remembers_is_what_training_renders(tokenizer):
    chat = chat_with(tokenizer, ["Paris.", "Rome."])
    "".join(chat.ask("France?")), "".join(chat.ask("Italy?"))
    messages = [("user", "France?"), ("assistant", "Paris."), ("user", "Italy?"), ("assistant", "Rome.")]
    ids, _ = tokenizer.render_conversation({"messages": [{"role": r, "content": c} for r, c in messages]})
    assert [tokenizer.get_bos_token_id()] + [token for turn in chat.turns for token in turn] == ids


def test_tool_calls_are_shown_and_remembered(tokenizer):
    special = tokenizer.encode_special
    reply = [*b"6*7", special("<|python_start|>"), *b"6*7", special("<|python_end|>"),
             special("<|output_start|>"), *b"42", special("<|output_end|>"), *b"42."]  # fmt: skip
    chat = chat_with(tokenizer, [reply, "ok"])
    assert "".join(chat.ask("?")) == "6*7[6*7]=[42]42."
    "".join(chat.ask("!"))
    remembered = "6*7<|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>42."
    assert chat.engine.prompts[1] == "<|bos|>" + turn("?", remembered) + turn("!")


def test_special_tokens_that_a_user_types_are_text(tokenizer):
    chat = chat_with(tokenizer, ["hm"])
    "".join(chat.ask("<|assistant_end|>"))
    assert tokenizer.encode_special("<|assistant_end|>") not in chat.turns[0][:-1]


def test_an_answer_that_is_stopped_half_way_is_remembered_as_far_as_it_went(tokenizer):
    chat = chat_with(tokenizer, ["abcdef", "ok"])
    pieces = chat.ask("?")
    assert next(pieces) + next(pieces) == "ab"
    pieces.close()
    "".join(chat.ask("!"))
    assert chat.engine.prompts[1] == "<|bos|>" + turn("?", "ab") + turn("!")


def test_a_full_context_forgets_the_oldest_turns_and_says_so(tokenizer, capsys):
    chat = chat_with(tokenizer, ["x" * 30, "y" * 30, "z" * 30, "w"], context=138, max_tokens=30)
    for letter in "abcd":
        "".join(chat.ask(letter))
    notes = capsys.readouterr().err
    assert "context of 138 tokens is full: the oldest turn was dropped" in notes
    assert chat.engine.prompts[2] == "<|bos|>" + turn("a", "x" * 30) + turn("b", "y" * 30) + turn("c")
    assert chat.engine.prompts[3] == "<|bos|>" + turn("b", "y" * 30) + turn("c", "z" * 30) + turn("d")


def test_there_is_always_room_for_an_answer(tokenizer):
    chat = chat_with(tokenizer, ["r" * 9] * 40, context=100, max_tokens=20)
    for i in range(40):
        turn_tokens = chat._open_turn("q" * (i % 30))
        used = 1 + sum(map(len, chat.turns)) + len(turn_tokens)
        assert used + 20 <= 100
        "".join(chat.ask("q" * (i % 30)))


def test_a_message_longer_than_the_context_is_refused_and_changes_nothing(tokenizer):
    chat = chat_with(tokenizer, ["one", "two"])
    "".join(chat.ask("a"))
    with pytest.raises(UserError, match="303 tokens and the model's context is 200"):
        "".join(chat.ask("x" * 300))
    "".join(chat.ask("b"))
    assert chat.engine.prompts[1] == "<|bos|>" + turn("a", "one") + turn("b")


def test_an_answer_cut_off_says_why(tokenizer):
    chat = chat_with(tokenizer, ["x" * 60, "short"])
    assert "".join(chat.ask("?")) == "x" * 50
    assert "50 tokens" in chat.cut_short
    "".join(chat.ask("?"))
    assert chat.cut_short == ""


def test_a_base_model_continues_text_and_remembers_nothing(tokenizer):
    chat = chat_with(tokenizer, [" Paris", " Rome"], raw=True)
    assert "".join(chat.ask("The capital of France is")) == " Paris"
    "".join(chat.ask("The capital of Italy is"))
    assert chat.engine.prompts == ["<|bos|>The capital of France is", "<|bos|>The capital of Italy is"]


# -----------------------------------------------------------------------------
# The program


@pytest.fixture(scope="module")
def artifacts(tokenizer, tmp_path_factory, make_random_model):
    """A base folder with a tokenizer and a small model for two stages that generates letters and never ends a reply."""
    base = tmp_path_factory.mktemp("artifacts")
    model = make_random_model(tokenizer, sequence_len=4096)
    compute = Compute(torch.device("cpu"), torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        tokenizer.save(base / "tokenizer")
        for stage in ("base", "sft"):
            meta = {"model_config": vars(model.config)}
            save_checkpoint(checkpoint_dir(stage, "d2"), 5, model.state_dict(), None, meta, tokenizer, compute)
    return base


@pytest.fixture
def in_base(artifacts, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(artifacts))


def test_one_prompt_one_answer(in_base, capsys):
    main(["-p", "hello", "-k", "5", "-m", "20", "--device-type", "cpu"])
    first = capsys.readouterr().out
    assert len(first) == 21 and first.endswith("\n") and first.strip().islower()
    main(["-p", "hello", "-k", "5", "-m", "20", "--device-type", "cpu"])
    assert capsys.readouterr().out == first
    main(["-p", "hello", "-i", "base", "-g", "d2", "-s", "5", "-t", "0", "-m", "7", "--device-type", "cpu"])
    assert len(capsys.readouterr().out) == 8


def test_a_conversation(in_base, capsys, monkeypatch):
    lines = iter(["hello", "", "clear", "x" * 5000, "again", "quit", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    main(["-k", "5", "-m", "10", "--device-type", "cpu"])
    shown = capsys.readouterr()
    assert shown.out.count("Assistant: ") == 2 and "New conversation." in shown.out
    assert "5003 tokens and the model's context is 4096" in shown.err
    assert next(lines) == "never read"


def test_the_end_of_input_leaves(in_base, monkeypatch):
    def end(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    main(["--device-type", "cpu"])


@pytest.mark.parametrize("arguments, says", [
    (["-p", "  "], "prompt is empty"),
    (["-p", "a", "-g", "d99"], "d99.*d2"),
    (["-p", "a", "-s", "7"], "step 7"),
    (["-p", "a", "-i", "mid"], "no mid checkpoint"),
])  # fmt: skip
def test_mistakes_are_told_in_a_line(in_base, arguments, says):
    with pytest.raises(UserError, match=says) as caught:
        main([*arguments, "--device-type", "cpu"])
    assert len(str(caught.value).splitlines()) <= 2


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom scripts.chat_cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'numpy', 'tiktoken', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stderr


def test_an_answer_imports_no_second_library(in_base):
    """What makes the first token late: compilers and algebra that torch imports when a model is made carelessly."""
    code = (
        "import sys\nfrom scripts.chat_cli import main\nmain(['-p', 'hello', '-m', '3', '--device-type', 'cpu'])\n"
        "heavy = ('torch._dynamo', 'torch._inductor', 'sympy', 'datasets', 'pyarrow', 'transformers', 'rustbpe')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stdout + done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_stops_the_answer_and_then_the_program(in_base):
    """A real second process: Ctrl-C in the middle of an answer, another question, Ctrl-C at the prompt."""
    chat = subprocess.Popen(
        [sys.executable, "-m", "scripts.chat_cli", "-k", "5", "-m", "100000", "--device-type", "cpu"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # tests that run in the background of a shell ignore SIGINT, and so would their children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    watchdog = threading.Timer(120, chat.kill)
    watchdog.start()

    def read_until(marker):
        seen = b""
        while not seen.endswith(marker):
            byte = chat.stdout.read(1)
            assert byte, f"ended after {seen!r}: {chat.stderr.read().decode()}"
            seen += byte
        return seen

    def ask(line):
        chat.stdin.write(line + b"\n")
        chat.stdin.flush()
        read_until(b"Assistant: ")
        assert chat.stdout.read(20).isalpha()  # it is streaming, and far from done

    try:
        read_until(b"User: ")
        for question in (b"hello", b"and again"):
            ask(question)
            chat.send_signal(signal.SIGINT)
            read_until(b"User: ")
        chat.send_signal(signal.SIGINT)
        _, notes = chat.communicate(timeout=60)
        assert chat.returncode == 0
        assert notes.decode().count("(stopped)") == 2 and "Traceback" not in notes.decode()
    finally:
        watchdog.cancel()
        chat.kill()
        chat.wait()
