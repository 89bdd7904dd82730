"""The terminal chat: memory, tool calls, a context that fills up, Ctrl-C in a real process, mistakes."""

import signal
import subprocess
import sys

import pytest
from chat_server import ROOT, TOKENIZER, ScriptedEngine, message, program
from tiny import Script

from nanochat.common import UserError, print0
from nanochat.engine import Engine
from scripts.chat_cli import Chat, answer, converse, main


def chat_with(*replies, context=200, max_tokens=50, system=""):
    scripts = iter(replies)
    engine = ScriptedEngine(lambda prompt: next(scripts), context=context)
    return Chat(engine, False, max_tokens, temperature=0.6, top_k=50, system=system)


def ask(chat, text):
    return "".join(chat.ask(text))


def prompt(*texts):
    """The prompt that training renders for these messages, user first; the assistant answers the last."""
    messages = [message(text, ("user", "assistant")[i % 2]) for i, text in enumerate(texts)]
    return TOKENIZER.render_for_completion({"messages": messages})


def test_a_conversation_is_remembered_as_training_renders_it():
    """After a reply that was stopped, one with a tool call, and a message that looks like a special token."""
    chat = chat_with("abcdef", "6*7<|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>42.", "é<|python_start|>1+")
    stopped = chat.ask("a")
    assert next(stopped) + next(stopped) == "ab"
    stopped.close()
    assert not chat.engine.busy
    assert ask(chat, "?") == "6*7[6*7]=[42]42."
    assert ask(chat, "<|assistant_end|>") == "é[1+]"
    parts = [{"type": "text", "text": "6*7"}, {"type": "python", "text": "6*7"},
             {"type": "python_output", "text": "42"}, {"type": "text", "text": "42."}]  # fmt: skip
    assert chat.engine.prompts[2] == prompt("a", "ab", "?", parts, "<|assistant_end|>")
    assert len({settings["seed"] for settings in chat.engine.settings}) == 3  # asking again may give another answer


@pytest.mark.parametrize("system", ["", "Be brief"])
def test_a_full_context_forgets_the_oldest_turns_and_says_so(system, capsys):
    first = system and system + "\n\n"  # of the first message, whichever it is
    x, y, z = (letter * 30 for letter in "xyz")
    chat = chat_with(x, y, z, "w", context=138 + len(first), max_tokens=30, system=system)
    for letter in "abcd":
        ask(chat, letter)
    assert f"context of {138 + len(first)} tokens is full: the oldest turn was dropped" in capsys.readouterr().err
    assert chat.engine.prompts[2:] == [prompt(first + "a", x, "b", y, "c"), prompt(first + "b", y, "c", z, "d")]


def test_notes_follow_a_reply_that_is_cut_off_and_refuse_a_message_that_is_too_long(capsys):
    chat = chat_with("x" * 60, "short")
    for text, says in (("?", "cut off after 50 tokens"), ("y" * 300, "303 tokens and the model's context is 200"), ("?", None)):
        answer(chat, text)
        shown = capsys.readouterr()
        assert says in shown.err and "\n" not in shown.err.strip() if says else shown.err == ""
    assert shown.out == "Assistant: short\n"
    assert chat.engine.prompts[1] == prompt("?", "x" * 50, "?")  # what was refused changed nothing


def test_control_characters_are_shown_and_not_sent_to_the_terminal(capsys):
    chat = chat_with("\x1b[31m\tred\n\r\b\x9b\x07é")
    answer(chat, "?")
    print0("\x1b]0;")  # as the training scripts print their samples
    assert capsys.readouterr().out == "Assistant: \\x1b[31m\tred\n\\r\\x08\\x9b\\x07é\n\\x1b]0;\n"
    assert "\x1b" in TOKENIZER.decode(chat.turns[0][1])  # the conversation is what the model wrote


def test_a_base_model_continues_text_and_remembers_nothing():
    model = Script(lambda tokens: ord("!"), sequence_len=9)
    chat = Chat(Engine(model, TOKENIZER), True, 2, temperature=0.6, top_k=50)
    assert [ask(chat, text) for text in ("ab", "c")] == ["!!", "!!"]
    assert model.seen == [TOKENIZER.encode("c!", prepend="<|bos|>")]


def type_lines(monkeypatch, *lines):
    lines = iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    return lines


@pytest.mark.parametrize("clear, leave", [("/clear", "/quit"), ("clear", "quit"), ("Clear", "/EXIT")])
def test_commands_apply_to_the_following_replies(clear, leave, monkeypatch):
    chat = chat_with("A", "B", "C", "D")
    lines = type_lines(monkeypatch, "hi", "/system Be brief", "/temperature 0", "/TopK  0", "/length 7", "x" * 200, "again", "",
                       clear, "/usr/bin", "/system", clear, "bye", leave, "not read")  # fmt: skip
    converse(chat, "sft d2 step 5")
    assert list(lines) == ["not read"]
    expected = [("hi",), ("Be brief\n\nhi", "A", "again"), ("Be brief\n\n/usr/bin",), ("bye",)]
    assert chat.engine.prompts == [prompt(*texts) for texts in expected]
    assert [tuple(settings.values()) for settings in chat.engine.settings[:2]] == [(0.6, 50, 1), (0, None, 2)]
    assert chat.max_tokens == 7


@pytest.mark.parametrize("line, says", [
    ("/temperature 5", "/temperature: 5 is not allowed: must be at most 2"),
    ("/topk many", "/topk: 'many' is not an integer"),
    ("/length 0", "/length: 0 is not allowed: must be at least 1"),
    ("/topk", "topk is 50"),
    ("/help", "commands: /system TEXT"),
    ("/Quiet now", "there is no /quiet; commands: /system TEXT"),
])  # fmt: skip
def test_a_command_gets_one_line_and_is_not_sent_to_the_model(line, says, monkeypatch, capsys):
    chat = chat_with("hello")
    type_lines(monkeypatch, line, "hi", "/quit")
    converse(chat, "sft d2 step 5")
    shown = capsys.readouterr().err
    assert shown.startswith(f"({says}") and shown.count("\n") == 1
    assert chat.engine.prompts == [prompt("hi")] and list(chat.engine.settings[0].values()) == [0.6, 50, 1]


# -----------------------------------------------------------------------------
# The program


def test_one_prompt_one_answer(chat_base, capsys):
    command = ["-p", "hello", "--device-type", "cpu"]
    main([*command, "-k", "5", "-m", "20"])
    shown = capsys.readouterr().out
    assert len(shown) == 21 and shown.endswith("\n") and shown.strip().islower()
    main([*command, "-i", "base", "-g", "d2", "-s", "5", "-t", "0", "-m", "7"])
    assert len(capsys.readouterr().out) == 8
    for seed in ("1", "2"):
        main([*command, "-k", "5", "-m", "20", "--seed", seed])
        assert (capsys.readouterr().out == shown) == (seed == "1")


@pytest.mark.parametrize("arguments, message", [
    (["-p", "  "], "prompt is empty"),
    (["-p", "a", "-i", "mid"], "no mid checkpoint"),
    (["-i", "base", "--system", "Be brief"], "a base model has no system prompt; omit --system"),
    (["-p", "a", "--system", "x" * 5000], "message with the system prompt has 5006 tokens"),
])  # fmt: skip
def test_wrong_arguments_are_one_line(chat_base, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        main([*arguments, "--device-type", "cpu"])
    assert "\n" not in str(error.value)


def test_an_answer_imports_no_heavy_library(chat_base):
    """Such as compilers and algebra, which torch imports when a model is built carelessly; they delay the first token."""
    code = (
        "import sys\nfrom scripts.chat_cli import main\nmain(['-p', 'hello', '-m', '3', '--device-type', 'cpu'])\n"
        "heavy = ('torch._dynamo', 'torch._inductor', 'sympy', 'datasets', 'pyarrow', 'transformers', 'rustbpe')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stdout + done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_stops_the_reply_and_then_the_program(chat_base, monkeypatch):
    """A real second process: Ctrl-C in the middle of a reply, another question with a bad byte, Ctrl-C at the prompt."""
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    with program("scripts.chat_cli", "-k", "5", "-m", "100000") as chat:

        def read_until(marker):
            seen = b""
            while not seen.endswith(marker):
                byte = chat.stdout.read(1)
                assert byte, f"ended after {seen!r}: {chat.stderr.read().decode()}"
                seen += byte

        read_until(b"Model: sft d2 step 5. ")
        read_until(b"User: ")
        for question in (b"hello\n", b"and \xff again\n"):
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
