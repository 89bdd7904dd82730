"""The terminal chat: memory, tool calls, a context that fills up, Ctrl-C in a real process, mistakes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from chat_server import TOKENIZER, ScriptedEngine, message, program, save_model

from nanochat.common import UserError
from scripts.chat_cli import Chat, answer, main

ROOT = Path(__file__).resolve().parents[1]


def chat_with(*replies, raw=False, context=200, max_tokens=50):
    scripts = iter(replies)
    engine = ScriptedEngine(lambda prompt: next(scripts), context=context)
    return Chat(engine, raw, max_tokens, temperature=0.6, top_k=50)


def ask(chat, text):
    return "".join(chat.ask(text))


def prompts(chat):
    return [seq.prompt for seq in chat.engine.submitted]


def prompt(*texts):
    """The prompt that training renders for these messages, user first; the assistant answers the last."""
    messages = [message(text, ("user", "assistant")[i % 2]) for i, text in enumerate(texts)]
    return TOKENIZER.render_for_completion({"messages": messages})


def test_a_conversation_is_remembered_as_training_renders_it_until_it_is_cleared():
    special_token_as_text = "<|assistant_end|>"
    chat = chat_with("one", "two", "three")
    assert [ask(chat, "a"), ask(chat, special_token_as_text)] == ["one", "two"]
    chat.turns.clear()
    assert ask(chat, "c") == "three"
    assert prompts(chat) == [prompt("a"), prompt("a", "one", special_token_as_text), prompt("c")]
    assert len({seq.settings["seed"] for seq in chat.engine.submitted}) == 3  # asking again may give another answer


def test_tool_calls_are_shown_and_remembered():
    chat = chat_with("6*7<|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>42.", "é<|python_start|>1+")
    assert ask(chat, "?") == "6*7[6*7]=[42]42."
    assert ask(chat, "!") == "é[1+]"
    kinds = ("text", "6*7"), ("python", "6*7"), ("python_output", "42"), ("text", "42.")
    assert prompts(chat)[1] == prompt("?", [{"type": kind, "text": text} for kind, text in kinds], "!")


def test_the_beginning_of_a_stopped_reply_is_remembered():
    chat = chat_with("abcdef", "ok")
    chunks = chat.ask("?")
    assert next(chunks) + next(chunks) == "ab"
    chunks.close()
    assert not chat.engine.seqs
    ask(chat, "!")
    assert prompts(chat)[1] == prompt("?", "ab", "!")


def test_a_full_context_forgets_the_oldest_turns_and_says_so(capsys):
    chat = chat_with("x" * 30, "y" * 30, "z" * 30, "w", context=138, max_tokens=30)
    for letter in "abcd":
        ask(chat, letter)
    assert "context of 138 tokens is full: the oldest turn was dropped" in capsys.readouterr().err
    assert prompts(chat)[2:] == [prompt("a", "x" * 30, "b", "y" * 30, "c"), prompt("b", "y" * 30, "c", "z" * 30, "d")]


def test_notes_follow_a_reply_that_is_cut_off_and_refuse_a_message_that_is_too_long(capsys):
    chat = chat_with("x" * 60, "short")
    for text, says in (("?", "cut off after 50 tokens"), ("y" * 300, "303 tokens and the model's context is 200"), ("?", None)):
        answer(chat, text)
        shown = capsys.readouterr()
        assert says in shown.err and "\n" not in shown.err.strip() if says else shown.err == ""
    assert shown.out == "Assistant: short\n"
    assert prompts(chat)[1] == prompt("?", "x" * 50, "?")  # what was refused changed nothing


def test_a_base_model_continues_text_and_remembers_nothing():
    chat = chat_with(" Paris", " Rome", raw=True)
    texts = ["The capital of France is", "The capital of Italy is"]
    assert [ask(chat, text) for text in texts] == [" Paris", " Rome"]
    assert prompts(chat) == TOKENIZER.encode(texts, prepend="<|bos|>")


# -----------------------------------------------------------------------------
# The program


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory, make_random_model):
    """A base folder with a small model for two stages that generates letters and never ends a reply."""
    base = tmp_path_factory.mktemp("artifacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        save_model(make_random_model(TOKENIZER, sequence_len=4096), "base", "sft")
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
def test_ctrl_c_stops_the_reply_and_then_the_program(in_base):
    """A real second process: Ctrl-C in the middle of a reply, another question, Ctrl-C at the prompt."""
    with program("scripts.chat_cli", "-k", "5", "-m", "100000") as chat:

        def read_until(marker):
            seen = b""
            while not seen.endswith(marker):
                byte = chat.stdout.read(1)
                assert byte, f"ended after {seen!r}: {chat.stderr.read().decode()}"
                seen += byte

        read_until(b"User: ")
        for question in (b"hello\n", b"and again\n"):
            chat.stdin.write(question)
            chat.stdin.flush()
            read_until(b"Assistant: ")
            assert chat.stdout.read(20).isalpha()  # it is streaming, and far from done
            chat.send_signal(signal.SIGINT)
            read_until(b"User: ")
        chat.send_signal(signal.SIGINT)
        notes = chat.communicate(timeout=60)[1].decode()
        assert chat.returncode == 0
        assert notes.count("(stopped)") == 2 and "Traceback" not in notes
