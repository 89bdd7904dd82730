"""Talk to a model in the terminal.

    python -m scripts.chat_cli                  # a conversation with the newest fine-tuned model
    python -m scripts.chat_cli -p "hello"       # one answer, and nothing else on standard output
    python -m scripts.chat_cli -i base          # a base model knows no turns: it continues raw text

`clear` forgets the conversation, `quit` leaves. Ctrl-C stops the answer that is being written;
at the prompt it leaves. The conversation is kept as the very tokens that were said, so nothing
is encoded twice; when the context is full the oldest turns are forgotten, and a line says so.
"""

import sys
from contextlib import closing, suppress

from nanochat import flags
from nanochat.common import UserError, compute_init, run_script

HELP = "Type 'clear' to forget the conversation and 'quit' to leave. Ctrl-C stops an answer."
# How a call of the calculator is shown: [48/2]=[24]
SHOWN = {"<|python_start|>": "[", "<|python_end|>": "]", "<|output_start|>": "=[", "<|output_end|>": "]"}


def parse_args(argv):
    parser = flags.make_parser(__doc__.split("\n")[0])
    parser.add_argument("-p", "--prompt", help="print the reply to this prompt and exit (default: a conversation)")
    flags.add_model_flags(parser, ["base", "mid", "sft", "rl"])
    flags.add_sampling_flags(parser, temperature=0.6)
    return parser.parse_args(argv)


def note(text: str) -> None:
    """Something about the conversation and not part of it: standard output holds only what the model says."""
    print(f"({text})", file=sys.stderr, flush=True)


class Chat:
    """A conversation with one model: what was said so far, as tokens, and how to go on."""

    def __init__(self, engine, raw: bool, max_tokens: int, temperature: float, top_k: int | None):
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.context = engine.model.config.sequence_len
        self.raw = raw  # continue text instead of answering
        self.max_tokens, self.temperature, self.top_k = max_tokens, temperature, top_k
        self.turns: list[list[int]] = []  # each: user_start .. user_end assistant_start .. assistant_end
        self.asked = 0  # seeds the next answer, so that asking again may say something else
        self.cut_short = ""  # why the last answer did not end by itself
        self.assistant_end = self.tokenizer.encode_special("<|assistant_end|>")
        self.shown = {self.tokenizer.encode_special(name): text for name, text in SHOWN.items()}

    def ask(self, text: str):
        """Yield the answer to `text` in pieces of whole characters.

        However it ends (done, stopped half way, interrupted), what was said is remembered.
        """
        bos = self.tokenizer.get_bos_token_id()
        turn = self._open_turn(text)
        prompt = [bos, *(token for earlier in self.turns for token in earlier), *turn]
        self.asked += 1
        said = []
        try:
            yield from self._decode(self._say(prompt, said))
        finally:
            if said and not self.raw:
                self.turns.append([*turn, *said, self.assistant_end])

    def _open_turn(self, text: str) -> list[int]:
        """The tokens that open a turn, after forgetting as many of the oldest turns as it takes to make room."""
        if self.raw:
            turn = self.tokenizer.encode(text)
        else:
            conversation = {"messages": [{"role": "user", "content": text}]}
            turn = self.tokenizer.render_for_completion(conversation)[1:]  # bos stands only before the first turn
        room = self.context - 1 - min(self.max_tokens, self.context // 4)  # the rest is for bos and the answer
        if len(turn) > room:
            raise UserError(
                f"that has {len(turn)} tokens, but the model's context holds {self.context}; keep it below {room}"
            )
        forgotten = 0
        while sum(map(len, self.turns)) + len(turn) > room:
            self.turns.pop(0)
            forgotten += 1
        if forgotten:
            turns = "turn is" if forgotten == 1 else f"{forgotten} turns are"
            note(f"the context of {self.context} tokens is full: the oldest {turns} forgotten; 'clear' starts afresh")
        return turn

    def _say(self, prompt: list[int], said: list[int]):
        """Yield the answer's tokens, gathering them in `said`."""
        for (token,), _ in self._columns(prompt):
            if token not in self.engine.terminal_tokens:
                said.append(token)
                yield token

    def _columns(self, prompt: list[int]):
        self.cut_short = ""
        (reason,) = yield from self.engine.generate(
            prompt, max_tokens=self.max_tokens, temperature=self.temperature, top_k=self.top_k, seed=self.asked
        )
        if reason == "context":
            self.cut_short = f"cut off: the context of {self.context} tokens is full; 'clear' starts afresh"
        elif reason == "length":
            self.cut_short = f"cut off after {self.max_tokens} tokens; -m allows more"

    def _decode(self, tokens):
        """Turn tokens into text as they come, never cutting a character."""
        from nanochat.tokenizer import StreamDecoder

        decoder = StreamDecoder(self.tokenizer)
        for token in tokens:
            yield decoder.finish() + self.shown[token] if token in self.shown else decoder.push(token)
        yield decoder.finish()


def converse(chat: Chat) -> None:
    """Read, answer, print, until the user leaves."""
    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history at the prompt, where the system has it)
    print(HELP)
    while True:
        try:
            text = input("\nText: " if chat.raw else "\nUser: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text in ("quit", "exit"):
            return
        if text == "clear":
            chat.turns.clear()
            print("Forgotten.")
        elif text:
            answer(chat, text)


def answer(chat: Chat, text: str) -> None:
    """Print one answer as it comes. Ctrl-C and a text that does not fit end the answer, not the conversation."""
    try:
        with closing(chat.ask(text)) as pieces:
            first = next(pieces, "")  # nothing is printed yet if the text turns out not to fit
            print((text if chat.raw else "Assistant: ") + first, end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
        print()
        if chat.cut_short:
            note(chat.cut_short)
    except KeyboardInterrupt:
        print()
        note("stopped")
    except UserError as error:
        note(str(error))


def main(argv=None):
    args = parse_args(argv)
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("the prompt is empty; write something after -p, or leave -p away for a conversation")

    from nanochat.checkpoint_manager import load_model
    from nanochat.device import prepare_for_inference
    from nanochat.engine import Engine

    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the chat
    compute = compute_init(args.device_type)
    model, tokenizer, meta = load_model(args.stage, compute, model_tag=args.model_tag, step=args.step)
    engine = Engine(prepare_for_inference(model), tokenizer, max_sequences=1)
    chat = Chat(engine, args.stage == "base", args.max_tokens, args.temperature, args.top_k or None)
    if args.prompt is None:
        converse(chat)
        return
    for piece in chat.ask(args.prompt):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run_script(main)
