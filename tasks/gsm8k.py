"""GSM8K: grade-school word problems, whose worked answers mark each calculation.

"Natalia sold 48/2 = <<48/2=24>>24 clips in May. ... #### 72" becomes a call of the calculator
for each mark, so that the model learns to calculate with the tool, and an answer after "####".

Cobbe et al. 2021, https://arxiv.org/abs/2110.14168. Hub: openai/gsm8k.
"""

from __future__ import annotations

import re

from tasks.common import Task, load_hub_dataset, same_final_number


class GSM8K(Task):
    """`subset` is "main" or "socratic"; `split` is "train" or "test"."""

    eval_type = "generative"
    examples = ("A box holds 12 pencils. How many pencils are in 7 boxes?",)

    def __init__(self, subset: str, split: str, **view):
        super().__init__(**view)
        assert subset in ("main", "socratic"), subset
        assert split in ("train", "test"), split
        self.rows = load_hub_dataset("openai/gsm8k", subset, split)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        return {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": answer_parts(row["answer"])},
            ]
        }

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Whether the number after "####" is that of the worked answer."""
        return same_final_number(conversation, completion)


def answer_parts(answer: str) -> list[dict]:
    """`"is 48/2 = <<48/2=24>>24."` -> text "is 48/2 = ", python "48/2", python_output "24", text "24."."""
    # split with a group: texts at even positions, marks between them
    parts = []
    for position, piece in enumerate(re.split(r"<<([^<>]*)>>", answer)):
        if position % 2 == 0:
            parts.append({"type": "text", "text": piece})
        else:
            expression, _, result = piece.rpartition("=")
            parts.append({"type": "python", "text": expression})
            parts.append({"type": "python_output", "text": result})
    return [part for part in parts if part["text"]]
