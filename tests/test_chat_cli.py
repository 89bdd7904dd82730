"""The terminal chat: memory, tool calls, a context that fills up, Ctrl-C in a real process, mistakes."""

import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_checkpoint_manager import BYTES, CPU

from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint
from nanochat.common import UserError
from scripts.chat_cli import Chat, main

ROOT = Path(__file__).resolve().parents[1]


class FakeEngine:
    """Generates the given replies and records its prompts."""

    tokenizer = BYTES
    end = BYTES.encode_special("<|assistant_end|>")
    terminal_tokens = {end, BYTES.get_bos_token_id()}

    def __init__(self, replies, context):
        self.replies = list(replies)
        self.model = SimpleNamespace(config=SimpleNamespace(sequence_len=context))
        self.prompts, self.seeds = [], []

    def generate(self, tokens, max_tokens, temperature, top_k, seed):
        self.prompts.append(tokens)
        self.seeds.append(seed)
        reply = self.replies.pop(0)
        for token in (BYTES.encode(reply) if isinstance(reply, str) else reply)[:max_tokens]:
            yield [token], [1]
        if len(reply) > max_tokens:
            return ["length"]
        yield [self.end], [1]
        return ["stop"]


def chat_with(replies, raw=False, context=200, max_tokens=50):
    return Chat(FakeEngine(replies, context), raw, max_tokens, temperature=0.6, top_k=50)


def ask(chat, text):
    return "".join(chat.ask(text))


def prompt(*texts):
    """The prompt that training renders for these messages, user first; the assistant answers the last."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return BYTES.render_for_completion({"messages": messages})


# -----------------------------------------------------------------------------
# A conversation


def test_a_conversation_is_remembered_as_training_renders_it_until_it_is_cleared():
    chat = chat_with(["one", "two", "three"])
    assert [ask(chat, "a"), ask(chat, "<|assistant_end|>")] == ["one", "two"]
    chat.turns.clear()
    assert ask(chat, "c") == "three"
    special_token_as_text = "<|assistant_end|>"
    assert chat.engine.prompts == [prompt("a"), prompt("a", "one", special_token_as_text), prompt("c")]
    assert len(set(chat.engine.seeds)) == 3  # asking again may give another answer


def test_tool_calls_are_shown_and_remembered():
    special = BYTES.encode_special
    reply = [*b"6*7", special("<|python_start|>"), *b"6*7", special("<|python_end|>"),
             special("<|output_start|>"), *b"42", special("<|output_end|>"), *b"42."]  # fmt: skip
    chat = chat_with([reply, "ok"])
    assert ask(chat, "?") == "6*7[6*7]=[42]42."
    ask(chat, "!")
    parts = [{"type": kind, "text": text} for kind, text in
             (("text", "6*7"), ("python", "6*7"), ("python_output", "42"), ("text", "42."))]  # fmt: skip
    assert chat.engine.prompts[1] == prompt("?", parts, "!")


def test_the_beginning_of_a_stopped_answer_is_remembered():
    chat = chat_with(["abcdef", "ok"])
    chunks = chat.ask("?")
    assert next(chunks) + next(chunks) == "ab"
    chunks.close()
    ask(chat, "!")
    assert chat.engine.prompts[1] == prompt("?", "ab", "!")


def test_a_full_context_forgets_the_oldest_turns_and_says_so(capsys):
    chat = chat_with(["x" * 30, "y" * 30, "z" * 30, "w"], context=138, max_tokens=30)
    for letter in "abcd":
        ask(chat, letter)
    assert "context of 138 tokens is full: the oldest turn was dropped" in capsys.readouterr().err
    assert chat.engine.prompts[2] == prompt("a", "x" * 30, "b", "y" * 30, "c")
    assert chat.engine.prompts[3] == prompt("b", "y" * 30, "c", "z" * 30, "d")


def test_a_message_longer_than_the_context_is_refused_and_changes_nothing():
    chat = chat_with(["one", "two"])
    ask(chat, "a")
    with pytest.raises(UserError, match="303 tokens and the model's context is 200"):
        ask(chat, "x" * 300)
    ask(chat, "b")
    assert chat.engine.prompts[1] == prompt("a", "one", "b")


def test_an_answer_that_is_cut_off_says_why():
    chat = chat_with(["x" * 60, "short"])
    assert ask(chat, "?") == "x" * 50
    assert "50 tokens" in chat.cut_short
    ask(chat, "?")
    assert chat.cut_short == ""


def test_a_base_model_continues_text_and_remembers_nothing():
    chat = chat_with([" Paris", " Rome"], raw=True)
    texts = ["The capital of France is", "The capital of Italy is"]
    assert [ask(chat, text) for text in texts] == [" Paris", " Rome"]
    assert chat.engine.prompts == BYTES.encode(texts, prepend="<|bos|>")


# -----------------------------------------------------------------------------
# The program


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory, make_random_model):
    """A base folder with a small model for two stages that generates letters and never ends a reply."""
    base = tmp_path_factory.mktemp("artifacts")
    model = make_random_model(BYTES, sequence_len=4096)
    meta = {"model_config": vars(model.config)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        for stage in ("base", "sft"):
            save_checkpoint(checkpoint_dir(stage, "d2"), 5, model.state_dict(), None, meta, BYTES, CPU)
    return base


@pytest.fixture
def in_base(artifacts, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(artifacts))


def test_one_prompt_one_answer(in_base, capsys):
    command = ["-p", "hello", "--device-type", "cpu"]
    answers = []
    for _ in range(2):
        main([*command, "-k", "5", "-m", "20"])
        answers.append(capsys.readouterr().out)
    assert len(answers[0]) == 21 and answers[0].endswith("\n") and answers[0].strip().islower()
    assert answers[0] == answers[1]
    main([*command, "-i", "base", "-g", "d2", "-s", "5", "-t", "0", "-m", "7"])
    assert len(capsys.readouterr().out) == 8


def test_commands_at_the_prompt(in_base, capsys, monkeypatch):
    def type_lines(*lines):
        lines = iter(lines)

        def read(prompt):
            if (line := next(lines)) is None:
                raise EOFError  # Ctrl-D
            return line

        monkeypatch.setattr("builtins.input", read)
        main(["-k", "5", "-m", "10", "--device-type", "cpu"])
        return list(lines)

    assert type_lines("hello", "", "clear", "x" * 5000, "again", "quit", "not read") == ["not read"]
    shown = capsys.readouterr()
    assert shown.out.count("Assistant: ") == 2 and "New conversation." in shown.out
    assert "5003 tokens and the model's context is 4096" in shown.err
    assert type_lines(None) == []


@pytest.mark.parametrize("arguments, message", [
    (["-p", "  "], "prompt is empty"),
    (["-p", "a", "-i", "mid"], "no mid checkpoint"),
])  # fmt: skip
def test_wrong_arguments_are_one_line(in_base, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        main([*arguments, "--device-type", "cpu"])
    assert len(str(error.value).splitlines()) == 1


def test_an_answer_imports_no_heavy_library(in_base):
    """Such as compilers and algebra, which torch imports when a model is built carelessly; they delay the first token."""
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
