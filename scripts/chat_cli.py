"""Chat with a model in the terminal.

    python -m scripts.chat_cli                  # a conversation with the newest fine-tuned model
    python -m scripts.chat_cli -p "hello"       # one reply, and nothing else on standard output
    python -m scripts.chat_cli --system "Answer in one sentence." -t 0
    python -m scripts.chat_cli -i base          # a base model does not chat: it continues the text

In a conversation, /help lists the commands. Ctrl-C stops the current reply; at the prompt it exits.
Replies are kept as tokens. When the context is full, the oldest turns are dropped, with a note.
"""

import re
import sys
from argparse import ArgumentTypeError
from contextlib import closing, suppress

from nanochat import flags
from nanochat.common import CONTROLS, UserError, compute_init, run_script
from nanochat.tokenizer import Segments

BRACKETS = {"text": ("", ""), "python": ("[", "]"), "python_output": ("=[", "]")}  # a call is shown as [48/2]=[24]
SETTINGS = {  # command: attribute of Chat, what it may be
    "/temperature": ("temperature", flags.TEMPERATURE),
    "/topk": ("top_k", flags.TOP_K),
    "/length": ("max_tokens", flags.COUNT),
}
HELP = "commands: /system TEXT, /temperature X, /topk K, /length N, /clear (a new conversation), /help, /quit"


def parse_args(argv):
    parser = flags.make_parser(__doc__)
    parser.add_argument("-p", "--prompt", help="print the reply to this prompt and exit (default: a conversation)")
    parser.add_argument("--system", default="", help="system prompt")
    flags.add_model_flags(parser, ["base", "mid", "sft", "rl"])
    group = flags.add_sampling_flags(parser, temperature=0.6)
    group.add_argument("--seed", type=flags.SEED, default=1, help="seed of the first reply; it grows by 1 with each")
    return parser.parse_args(argv)


def note(text: str) -> None:
    """Standard output holds only the text of the model."""
    print(f"({text})", file=sys.stderr, flush=True)


class Chat:
    """A conversation with one model, as tokens."""

    def __init__(self, engine, raw: bool, max_tokens: int, temperature: float, top_k: int, seed: int = 1, system: str = ""):
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.raw = raw  # continue text instead of answering
        self.max_tokens, self.temperature, self.top_k = max_tokens, temperature, top_k
        self.seed, self.system = seed, system  # the next reply's seed, so that repeating a question can give another reply
        self.turns: list[tuple[str, list[int]]] = []  # each: a message, the tokens of its reply
        self.finish_reason: str | None = None  # of the last reply

    def ask(self, text: str):
        """Yield the reply to `text`, which becomes part of the conversation, also if it is stopped, in whole characters."""
        prompt = self._make_prompt(text)
        seq = self.engine.submit(prompt, self.max_tokens, temperature=self.temperature, top_k=self.top_k or None, seed=self.seed)
        self.seed += 1
        segments, kind = Segments(self.tokenizer), "text"
        try:
            while seq.finish_reason is None:
                new = [segment for _, token, _ in self.engine.step() for segment in segments.push(token)]
                if seq.finish_reason:
                    new += [*segments.finish(), ("text", "")]  # the last closes a call that was cut off
                for next_kind, chunk in new:
                    if next_kind != kind:
                        yield BRACKETS[kind][1] + BRACKETS[next_kind][0]
                        kind = next_kind
                    yield chunk.translate(CONTROLS)  # also if it is not for a terminal, since it may go to one later
        finally:
            self.engine.cancel(seq)
            self.finish_reason = seq.finish_reason
            said = [token for token in seq.generated if token not in self.engine.terminal_tokens]
            if said and not self.raw:
                self.turns.append((text, [*said, self.tokenizer.encode_special("<|assistant_end|>")]))

    def _make_prompt(self, text: str) -> list[int]:
        """The tokens up to the reply to `text`, after dropping the oldest turns as far as needed to make room."""
        context = self.engine.context
        room = context - 1 - min(self.max_tokens, context // 4)  # the rest is for bos and the reply
        if (needed := len(self._render([], text)) - 1) > room:
            what = "message with the system prompt" if self.system else "message"
            raise UserError(f"the {what} has {needed} tokens and the model's context is {context}; keep it below {room}")
        while len(prompt := self._render(self.turns, text)) - 1 > room:
            self.turns.pop(0)
            note(f"the context of {context} tokens is full: the oldest turn was dropped; /clear starts a new conversation")
        return prompt

    def _render(self, turns: list, text: str) -> list[int]:
        """The conversation as training renders it, with the system prompt in its first message."""
        if self.raw:
            return self.tokenizer.encode(text, prepend="<|bos|>")
        tokens: list[int] = []
        for content, reply in [*turns, (text, [])]:
            system = [] if tokens or not self.system else [{"role": "system", "content": self.system}]
            message = self.tokenizer.render_for_completion({"messages": [*system, {"role": "user", "content": content}]})
            tokens += (message[1:] if tokens else message) + reply  # one bos
        return tokens


def converse(chat: Chat, name: str) -> None:
    """Read messages and print replies until the user exits."""
    with suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history at the prompt, if available
    with suppress(AttributeError):  # of a standard input that is closed
        sys.stdin.reconfigure(errors="replace")  # for what is not UTF-8
    print(f"Model: {name}. Type /help for the commands and /quit to exit. Ctrl-C stops a reply.")
    try:
        while (text := input("\nText: " if chat.raw else "\nUser: ").strip()).lower() not in ("quit", "exit", "/quit", "/exit"):
            if text.lower() == "clear":
                text = "/clear"
            if command := re.fullmatch(r"(/[a-z]*)(?:\s+(.*))?", text, re.IGNORECASE):  # but "/usr/bin" is text
                run_command(chat, command[1].lower(), command[2] or "")
            elif text:
                answer(chat, text)
    except (EOFError, KeyboardInterrupt):
        print()


def run_command(chat: Chat, command: str, value: str) -> None:
    """Change a setting of the chat, or say what is wrong with the command."""
    if command == "/clear":
        chat.turns.clear()
        note("a new conversation")
    elif command == "/system" and chat.raw:
        note("a base model has no system prompt")
    elif command == "/system":
        chat.system = value
        note(f"system prompt: {value.translate(CONTROLS) or 'none'}")
    elif command in SETTINGS:
        name, kind = SETTINGS[command]
        try:
            if value:
                setattr(chat, name, kind(value))
            note(f"{command[1:]} is {getattr(chat, name)}")
        except ArgumentTypeError as error:
            note(f"{command}: {error}")
    else:
        note(HELP if command == "/help" else f"there is no {command}; {HELP}")


def answer(chat: Chat, text: str) -> None:
    """Print one reply while it is generated. Ctrl-C and a message that is too long end the reply, not the conversation."""
    try:
        with closing(chat.ask(text)) as chunks:
            first = next(chunks, "")  # raises before anything is printed if the message is too long
            print((text.translate(CONTROLS) if chat.raw else "Assistant: ") + first, end="", flush=True)
            for chunk in chunks:
                print(chunk, end="", flush=True)
        print()
        if chat.finish_reason == "context":
            note(f"cut off: the context of {chat.engine.context} tokens is full; /clear starts a new conversation")
        elif chat.finish_reason == "length":
            note(f"cut off after {chat.max_tokens} tokens; /length N or -m allows longer ones")
    except KeyboardInterrupt:
        print()
        note("stopped")
    except UserError as error:
        note(str(error))


def main(argv=None):
    args = parse_args(argv)
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("the prompt is empty; give -p a text, or omit it for a conversation")
    if args.system and args.stage == "base":
        raise UserError("a base model has no system prompt; omit --system, or choose another model with -i")

    from nanochat.checkpoint_manager import load_model
    from nanochat.engine import Engine

    compute = compute_init(args.device_type)
    model, tokenizer, meta = load_model(args.stage, compute, model_tag=args.model_tag, step=args.step)
    engine = Engine(model.to(compute.dtype), tokenizer, max_sequences=1)
    chat = Chat(engine, args.stage == "base", args.max_tokens, args.temperature, args.top_k, args.seed, args.system.strip())
    if args.prompt is None:
        converse(chat, f"{args.stage} {meta['model_tag']} step {meta['step']}")
        return
    for chunk in chat.ask(args.prompt):
        print(chunk, end="", flush=True)
    print()


if __name__ == "__main__":
    run_script(main)
