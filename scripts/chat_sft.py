"""Supervised fine-tuning: the loss covers only what the assistant must say.

    python -m scripts.chat_sft
    python -m scripts.chat_sft --tasks=SampleWorld,my.jsonl --model-tag=d4  # own conversations; no connection needed

It starts from the newest midtrained model with that model's batch size, rates and optimizer state.
Every supervised token is seen once per epoch, however long its conversation is.
"""

from __future__ import annotations

from nanochat import flags
from nanochat.common import get_base_dir, run_script
from nanochat.finetune import add_flags, finetune


def main(argv=None):
    parser = flags.make_parser(__doc__)
    add_flags(
        parser, stages=["base", "mid", "sft"], stage="mid",
        tasks="ARC-Easy,ARC-Challenge,GSM8K,SmolTalk,Identity,SimpleSpelling,SpellingBee",
        others="SampleWorld", init_lr_frac=0.5, warmdown=1.0,
    )
    args = parser.parse_args(argv)

    def load_data(compute):
        from tasks.arc import ARC
        from tasks.common import mixtures
        from tasks.customjson import CustomJSON
        from tasks.gsm8k import GSM8K
        from tasks.sample_world import SampleWorld
        from tasks.smoltalk import SmolTalk
        from tasks.spellingbee import SimpleSpelling, SpellingBee

        identity = get_base_dir() / "identity_conversations.jsonl"  # python -m dev.gen_identity writes a first one
        train = {
            "ARC-Easy": lambda: ARC("ARC-Easy", "train"),
            "ARC-Challenge": lambda: ARC("ARC-Challenge", "train"),
            "GSM8K": lambda: GSM8K("main", "train"),
            "SmolTalk": lambda: SmolTalk("train", stop=10000),
            "Identity": lambda: CustomJSON(identity),
            "SimpleSpelling": lambda: SimpleSpelling(300, "train"),
            "SpellingBee": lambda: SpellingBee(300, "train"),
            "SampleWorld": lambda: SampleWorld("train", size=18000, start=12400),
        }
        val = {
            "ARC-Easy": lambda: ARC("ARC-Easy", "validation"),
            "ARC-Challenge": lambda: ARC("ARC-Challenge", "validation"),
            "GSM8K": lambda: GSM8K("main", "test", stop=420),
            "SmolTalk": lambda: SmolTalk("test", stop=1000),
            "SampleWorld": lambda: SampleWorld("train", size=12400, start=12000),
        }
        explicit = args.tasks != parser.get_default("tasks")
        return mixtures(train, val, args.tasks, compute, explicit, read=CustomJSON)

    finetune("sft", parser, args, load_data, supervise="assistant")


if __name__ == "__main__":
    run_script(main)
