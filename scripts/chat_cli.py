"""Chat with a model in the terminal.

    python -m scripts.chat_cli                  # a conversation with the newest fine-tuned model
    python -m scripts.chat_cli -p "hello"       # one reply, and nothing else on standard output
    python -m scripts.chat_cli -i base          # a base model does not chat: it continues the text

`clear` starts a new conversation, `quit` exits. Ctrl-C stops the current reply; at the prompt it exits.
The conversation is kept as tokens. When the context is full, the oldest turns are dropped, with a note.
"""

import sys
from contextlib import closing, suppress

from nanochat import flags
from nanochat.common import CONTROLS, UserError, compute_init, run_script

BRACKETS = {"text": ("", ""), "python": ("[", "]"), "python_output": ("=[", "]")}  # a call is shown as [48/2]=[24]


def parse_args(argv):
    parser = flags.make_parser(__doc__.split("\n")[0])
    parser.add_argument("-p", "--prompt", help="print the reply to this prompt and exit (default: a conversation)")
    flags.add_model_flags(parser, ["base", "mid", "sft", "rl"])
    flags.add_sampling_flags(parser, temperature=0.6)
    return parser.parse_args(argv)


def note(text: str) -> None:
    """Standard output holds only the text of the model."""
    print(f"({text})", file=sys.stderr, flush=True)


class Chat:
    """A conversation with one model, as tokens."""

    def __init__(self, engine, raw: bool, max_tokens: int, temperature: float, top_k: int | None):
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.raw = raw  # continue text instead of answering
        self.max_tokens, self.temperature, self.top_k = max_tokens, temperature, top_k
        self.turns: list[list[int]] = []  # each: user_start .. user_end assistant_start .. assistant_end
        self.asked = 0  # the next reply's seed, so that repeating a question can give another reply
        self.finish_reason: str | None = None  # of the last reply

    def ask(self, text: str):
        """Yield the reply to `text`, which becomes part of the conversation, also if it is stopped, in whole characters."""
        from nanochat.tokenizer import Segments

        turn = self._open_turn(text)
        prompt = [self.tokenizer.get_bos_token_id(), *(token for earlier in self.turns for token in earlier), *turn]
        self.asked += 1
        seq = self.engine.submit(prompt, self.max_tokens, temperature=self.temperature, top_k=self.top_k, seed=self.asked)
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
                self.turns.append([*turn, *said, self.tokenizer.encode_special("<|assistant_end|>")])

    def _open_turn(self, text: str) -> list[int]:
        """The tokens of a user message, after dropping the oldest turns as far as needed to make room."""
        if self.raw:
            turn = self.tokenizer.encode(text)
        else:
            turn = self.tokenizer.render_for_completion({"messages": [{"role": "user", "content": text}]})[1:]  # without bos
        context = self.engine.context
        room = context - 1 - min(self.max_tokens, context // 4)  # the rest is for bos and the reply
        if len(turn) > room:
            raise UserError(f"the message has {len(turn)} tokens and the model's context is {context}; keep it below {room}")
        while sum(map(len, self.turns)) + len(turn) > room:
            self.turns.pop(0)
            note(f"the context of {context} tokens is full: the oldest turn was dropped; 'clear' starts a new conversation")
        return turn


def converse(chat: Chat) -> None:
    """Read messages and print replies until the user exits."""
    with suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history at the prompt, if available
    with suppress(AttributeError):  # of a standard input that is closed
        sys.stdin.reconfigure(errors="replace")  # for what is not UTF-8
    print("Type 'clear' for a new conversation and 'quit' to exit. Ctrl-C stops a reply.")
    try:
        while (text := input("\nText: " if chat.raw else "\nUser: ").strip()) not in ("quit", "exit"):
            if text == "clear":
                chat.turns.clear()
                print("New conversation.")
            elif text:
                answer(chat, text)
    except (EOFError, KeyboardInterrupt):
        print()


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
            note(f"cut off: the context of {chat.engine.context} tokens is full; 'clear' starts a new conversation")
        elif chat.finish_reason == "length":
            note(f"cut off after {chat.max_tokens} tokens; raise -m for longer replies")
    except KeyboardInterrupt:
        print()
        note("stopped")
    except UserError as error:
        note(str(error))


def main(argv=None):
    args = parse_args(argv)
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("the prompt is empty; give -p a text, or omit it for a conversation")

    from nanochat.checkpoint_manager import load_model
    from nanochat.device import prepare_for_inference
    from nanochat.engine import Engine

    compute = compute_init(args.device_type)
    model, tokenizer, _ = load_model(args.stage, compute, model_tag=args.model_tag, step=args.step)
    engine = Engine(prepare_for_inference(model), tokenizer, max_sequences=1)
    chat = Chat(engine, args.stage == "base", args.max_tokens, args.temperature, args.top_k or None)
    if args.prompt is None:
        converse(chat)
        return
    for chunk in chat.ask(args.prompt):
        print(chunk, end="", flush=True)
    print()


if __name__ == "__main__":
    run_script(main)
