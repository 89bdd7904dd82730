"""Import a model from the reference's layout (`model_NNNNNN.pt`, `meta_NNNNNN.json`, `tokenizer.pkl`), weights only.

    python -m scripts.export --from ~/downloads/d20 --to-stage sft --model-tag d20
    python -m scripts.chat_cli -g d20

Nothing in those files is executed: weights go through PyTorch's weights-only reader, and the tokenizer through an
unpickler that can name a single class, which only stores its state.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
from pathlib import Path

from nanochat import flags
from nanochat.common import UserError, compute_init, print0, run_script

# What a pickled Encoding consists of. Others could ask for 34 GB with 20 bytes, or nest tuples that take for ever to hash.
OPCODES = set(
    "PROTO FRAME MARK MEMOIZE BINGET LONG_BINGET STACK_GLOBAL EMPTY_TUPLE NEWOBJ BUILD STOP EMPTY_DICT SETITEM SETITEMS "
    "SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES BININT BININT1 BININT2".split()
)


def main(argv=None):
    parser = flags.make_parser("Import a model of the reference's layout.")
    parser.add_argument("--from", dest="folder", type=Path, required=True, help="folder of the model")
    parser.add_argument("--tokenizer", type=Path, default=None, help="its tokenizer.pkl (default: in that folder)")
    parser.add_argument("--step", type=flags.number(int, 0), default=None, help="which step (default: the last)")
    parser.add_argument("--to-stage", default="sft", choices=["base", "mid", "sft", "rl"], help="stage of the imported model")
    parser.add_argument("--model-tag", type=flags.tag, help="tag of the imported model (default: the folder's name)")
    args = parser.parse_args(argv)

    from nanochat.checkpoint_manager import build_model, checkpoint_dir
    from nanochat.saver import Saver

    compute = compute_init("cpu")
    folder = args.folder.expanduser()
    numbers = [path.stem.removeprefix("model_") for path in folder.glob("model_*.pt")]
    steps = sorted(int(number) for number in numbers if number.isdigit())
    step = max(steps, default=None) if args.step is None else args.step
    if step not in steps:
        raise UserError(f"there is no model of step {step} in {folder}; there are steps {steps}")
    state, meta = read_weights(folder, step)
    tokenizer = read_tokenizer(args.tokenizer or folder / "tokenizer.pkl")
    model = build_model(state, meta["model_config"], compute)  # checks names and shapes, adds what older models lack
    if model.config.vocab_size != tokenizer.get_vocab_size():
        raise UserError(f"the model has a vocabulary of {model.config.vocab_size}, the tokenizer of {tokenizer.get_vocab_size()}")

    tag = args.model_tag or folder.resolve().name
    saver = Saver(checkpoint_dir(args.to_stage, tag), compute)
    meta = {**meta, "model_config": vars(model.config), "tokenizer": tokenizer.fingerprint()}
    saver.save(step, model.state_dict(), None, meta, tokenizer)
    saver.close()
    print0(f"imported {folder}; chat with it: python -m scripts.chat_cli -i {args.to_stage} -g {tag}")


def read_weights(folder: Path, step: int) -> tuple[dict, dict]:
    """(state dict, meta) of one step."""
    import torch

    path = folder / f"model_{step:06d}.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        meta = json.loads((folder / f"meta_{step:06d}.json").read_text(encoding="utf-8"))
        state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
        config = dict(meta["model_config"])
    except Exception as error:  # a damaged file can raise nearly anything; one with code, pickle.UnpicklingError
        reason = repr(error).splitlines()[0][:200]
        raise UserError(f"{path} or its meta file is damaged, or holds something other than weights ({reason})") from error
    if "smear_lambda" not in state:  # earlier models had full context, another rotary base, unscaled q and k
        config = {"window_pattern": "L", "rotary_base": 10000.0, "qk_scale": 1.0, **config}
    return state, {"user_config": {}, **meta, "model_config": config}


def read_tokenizer(path: Path):
    """The RustBPETokenizer of a pickled tiktoken Encoding."""
    from nanochat.tokenizer import RustBPETokenizer, check_vocabulary

    class PickledEncoding:
        def __setstate__(self, state):
            self.state = state

    class EncodingUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            if name == "Encoding" and module in ("tiktoken", "tiktoken.core"):
                return PickledEncoding
            raise pickle.UnpicklingError(f"refused: it wants to run {module}.{name}")

    try:
        data = path.read_bytes()
        if extra := {opcode.name for opcode, _, _ in pickletools.genops(data)} - OPCODES:
            raise pickle.UnpicklingError(f"refused: no tokenizer needs {', '.join(sorted(extra))}")
        state = EncodingUnpickler(io.BytesIO(data)).load().state
        check_vocabulary(state["mergeable_ranks"], state["special_tokens"])
        return RustBPETokenizer(state["mergeable_ranks"], state["pat_str"], state["special_tokens"])
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"the tokenizer {path} cannot be used: {error}") from error


if __name__ == "__main__":
    run_script(main)
