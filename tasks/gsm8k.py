"""GSM8K: grade-school word problems, whose worked answers mark each calculation.

"Natalia sold 48/2 = <<48/2=24>>24 clips in May. ... #### 72" becomes a call of the calculator
for each mark, so that the model learns to calculate with the tool, and an answer after "####".

Cobbe et al. 2021, https://arxiv.org/abs/2110.14168. Hub: openai/gsm8k.
"""

import re

from tasks.common import NumberTask, final_number, load_hub_dataset, single_turn


class GSM8K(NumberTask):
    """`subset` is "main" or "socratic"; `split` is "train" or "test"."""

    examples = ("A box holds 12 pencils. How many pencils are in 7 boxes?",)

    def __init__(self, subset: str, split: str, **view):
        super().__init__(**view)
        self.rows = load_hub_dataset("openai/gsm8k", subset, split)

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        parts = answer_parts(row["answer"])
        assert final_number(parts[-1]["text"]) is not None, "no number after ####"
        return single_turn(row["question"], parts)


def answer_parts(answer: str) -> list[dict]:
    """`"is 48/2 = <<48/2=24>>24."` -> text "is 48/2 = ", python "48/2", python_output "24", text "24."."""
    parts = []
    for position, segment in enumerate(re.split(r"<<([^<>]*)>>", answer)):  # text, mark, text, ..., text
        if position % 2 == 0:
            parts.append(("text", segment))
        else:
            expression, _, result = segment.rpartition("=")
            parts += [("python", expression), ("python_output", result)]
    return [{"type": kind, "text": text} for kind, text in parts if text]
