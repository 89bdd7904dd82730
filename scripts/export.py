"""Export a model as a Hugging Face folder, or import one from such a folder or from the reference's layout.

    python -m scripts.export -i sft --to ~/my-model      # the newest sft model; -g and -s choose another one
    python -m scripts.export --from ~/downloads/d32      # becomes the sft model d32; --to-stage and -g name another
    python -m scripts.chat_cli -g d32

Models of `base_train --plain`, and what later stages make of them, load elsewhere with
AutoModelForCausalLM.from_pretrained(DIR); other models need trust_remote_code=True, since DIR contains their code.

Import takes config.json, safetensors and tokenizer.json of a NanoChatForCausalLM or of an export, or the reference's
model_NNNNNN.pt, meta_NNNNNN.json and tokenizer.pkl. Nothing in these files is executed: weights go through safetensors
or PyTorch's weights-only reader, the pickled tokenizer through an unpickler that knows no class but a namespace.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
from pathlib import Path
from types import SimpleNamespace

from nanochat import flags
from nanochat.common import Compute, UserError, print0, run_script

STAGES = ["base", "mid", "sft", "rl"]

# What a pickled Encoding consists of. Others could ask for 34 GB with 20 bytes, or nest tuples that take for ever to hash.
OPCODES = set(
    "PROTO FRAME MARK MEMOIZE BINGET LONG_BINGET STACK_GLOBAL EMPTY_TUPLE NEWOBJ BUILD STOP EMPTY_DICT SETITEM SETITEMS "
    "SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES BININT BININT1 BININT2".split()
)


def main(argv=None):
    parser = flags.make_parser(__doc__)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", type=Path, metavar="DIR", help="export into this new folder")
    direction.add_argument("--from", dest="source", type=Path, metavar="DIR", help="import from this folder")
    group = parser.add_argument_group("export")
    group.add_argument("-i", "--stage", default="sft", choices=STAGES, help="the model's stage")
    group = parser.add_argument_group("import")
    group.add_argument("--to-stage", default="sft", choices=STAGES, help="stage of the imported model")
    group.add_argument("--tokenizer", type=Path, default=None, help="tokenizer.pkl of the reference (default: in that folder)")
    group = parser.add_argument_group("both")
    tag = "the model's tag (default: the newest model of the stage; for an imported one, the folder's name)"
    group.add_argument("-g", "--model-tag", type=flags.tag, help=tag)
    group.add_argument("-s", "--step", type=flags.number(int, 0), default=None, help="the checkpoint's step (default: the last)")
    args = parser.parse_args(argv)

    import torch

    compute = Compute(torch.device("cpu"), torch.float32)
    if args.to:
        export_model(args, args.to.expanduser(), compute)
    else:
        import_model(args, args.source.expanduser(), compute)


def export_model(args, folder: Path, compute: Compute) -> None:
    from nanochat.checkpoint_manager import load_model
    from nanochat.hf_folder import write_folder

    model, tokenizer, meta = load_model(args.stage, compute, args.model_tag, args.step)
    card = model_card(args.stage, model, meta)
    write_folder(folder, model, tokenizer, card)
    print0(f"exported {args.stage} {meta['model_tag']} of step {meta['step']}; load it with "
           f"AutoModelForCausalLM.from_pretrained({str(folder)!r}{card['remote']})")


def import_model(args, folder: Path, compute: Compute) -> None:
    from nanochat.checkpoint_manager import build_model, checkpoint_dir, list_steps
    from nanochat.hf_folder import read_folder
    from nanochat.saver import Saver

    step = args.step
    if (folder / "config.json").exists():
        state, config, tokenizer = read_folder(folder)
        step, meta = step or 0, {"user_config": {}}
    else:
        numbers = [path.stem.removeprefix("model_") for path in folder.glob("model_*.pt")]
        steps = sorted(int(number) for number in numbers if number.isdigit())
        if not steps:
            raise UserError(f"there is no model in {folder}: neither config.json nor model_NNNNNN.pt")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise UserError(f"there is no model of step {step} in {folder}; there are steps {steps}")
        state, meta = read_weights(folder, step)
        config, tokenizer = meta["model_config"], read_tokenizer(args.tokenizer or folder / "tokenizer.pkl")
    model = build_model(state, config, compute)  # checks names and shapes, adds what older models lack
    if model.config.vocab_size != tokenizer.get_vocab_size():
        raise UserError(f"the model has a vocabulary of {model.config.vocab_size}, the tokenizer of {tokenizer.get_vocab_size()}")

    tag = args.model_tag or folder.resolve().name
    directory = checkpoint_dir(args.to_stage, tag)
    if set(list_steps(directory)) - {step}:
        raise UserError(f"{directory} holds other checkpoints; choose another --model-tag")
    saver = Saver(directory, compute)
    meta = {**meta, "model_config": vars(model.config), "tokenizer": tokenizer.fingerprint()}
    saver.save(step, model.state_dict(), None, meta, tokenizer)
    saver.close()
    print0(f"imported {folder}; chat with it: python -m scripts.chat_cli -i {args.to_stage} -g {tag}")


def model_card(stage: str, model, meta: dict) -> dict[str, str]:
    """What fills in README.md: what the model is, and the scores in the report, where that is of this model."""
    from nanochat import report

    config, tag, step = model.config, meta["model_tag"], meta["step"]
    entries = report.read_entries(report.get_base_dir() / "report" / "report.jsonl")
    runs = [entry["data"] for entry in entries if entry["data"].get("stage") == stage and "model tag" in entry["data"]]
    ours = runs and runs[-1]["model tag"] == tag and runs[-1].get("steps") == step
    parameters = model.num_scaling_params()["total"] / 1e6
    return {
        "title": f"{tag}, a nanochat ({stage})",
        "facts": f"{parameters:.1f}M parameters, {config.n_layer} layers, {config.sequence_len} tokens of context, step {step}.",
        "remote": "" if config.plain else ", trust_remote_code=True",
        "results": report.final_table(entries) if ours else "Not measured.",
    }


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

    class EncodingUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            if name == "Encoding" and module in ("tiktoken", "tiktoken.core"):
                return SimpleNamespace
            raise pickle.UnpicklingError(f"refused: it wants to run {module}.{name}")

    try:
        data = path.read_bytes()
        if extra := {opcode.name for opcode, _, _ in pickletools.genops(data)} - OPCODES:
            raise pickle.UnpicklingError(f"refused: no tokenizer needs {', '.join(sorted(extra))}")
        state = vars(EncodingUnpickler(io.BytesIO(data)).load())
        check_vocabulary(state["mergeable_ranks"], state["special_tokens"])
        return RustBPETokenizer(state["mergeable_ranks"], state["pat_str"], state["special_tokens"])
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"the tokenizer {path} cannot be used: {error}") from error


if __name__ == "__main__":
    run_script(main)
