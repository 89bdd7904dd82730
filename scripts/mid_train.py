"""Midtraining: the base model learns the form of conversations, their special tokens and its tools.

    python -m scripts.mid_train
    python -m scripts.mid_train --tasks=SampleWorld --model-tag=d4      # no connection needed

It starts from the newest base model with that model's batch size, rates and optimizer state.
Every token of a conversation is supervised; none is cropped.
"""

from __future__ import annotations

from nanochat import flags
from nanochat.common import get_base_dir, run_script
from nanochat.finetune import add_flags, finetune


def main(argv=None):
    parser = flags.make_parser(__doc__)
    add_flags(
        parser, stages=["base", "mid"], stage="base", tasks="SmolTalk,MMLU,GSM8K,Identity,SimpleSpelling,SpellingBee",
        others="SampleWorld", init_lr_frac=1.0, warmdown=0.8,
    )
    args = parser.parse_args(argv)

    def load_data(compute):
        from tasks.common import TaskSequence, mixtures
        from tasks.customjson import CustomJSON
        from tasks.gsm8k import GSM8K
        from tasks.mmlu import MMLU
        from tasks.sample_world import SampleWorld
        from tasks.smoltalk import SmolTalk
        from tasks.spellingbee import SimpleSpelling, SpellingBee

        identity = get_base_dir() / "identity_conversations.jsonl"  # python -m dev.gen_identity writes a first one
        train = {
            "SmolTalk": lambda: SmolTalk("train"),
            "MMLU": lambda: MMLU("auxiliary_train", "train"),
            "GSM8K": lambda: GSM8K("main", "train"),
            "Identity": lambda: TaskSequence([CustomJSON(identity)] * 2),
            "SimpleSpelling": lambda: SimpleSpelling(200000, "train"),
            "SpellingBee": lambda: SpellingBee(80000, "train"),
            "SampleWorld": lambda: SampleWorld("train", size=12000),
        }
        val = {
            "SmolTalk": lambda: SmolTalk("test"),
            "MMLU": lambda: MMLU("all", "test", stop=5200),
            "GSM8K": lambda: GSM8K("main", "test", stop=420),
            "SimpleSpelling": lambda: SimpleSpelling(1000, "test"),
            "SpellingBee": lambda: SpellingBee(1000, "test"),
            "SampleWorld": lambda: SampleWorld("train", size=12400, start=12000),
        }
        explicit = args.tasks != parser.get_default("tasks")
        return mixtures(train, val, args.tasks, compute, explicit, read=CustomJSON)

    finetune("mid", parser, args, load_data, supervise="all")


if __name__ == "__main__":
    run_script(main)
