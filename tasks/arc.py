"""ARC: multiple-choice science questions from school exams, an easy and a hard set.

Clark et al. 2018, https://arxiv.org/abs/1803.05457. Hub: allenai/ai2_arc.
"""

from tasks.common import CategoricalTask, load_hub_dataset, render_mc, single_turn


class ARC(CategoricalTask):
    """`subset` is "ARC-Easy" or "ARC-Challenge"; `split` is "train", "validation" or "test"."""

    def __init__(self, subset: str, split: str, **view):
        super().__init__(**view)
        self.rows = load_hub_dataset("allenai/ai2_arc", subset, split)

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        letters = row["choices"]["label"]  # mostly A to D, here and there 1 to 4, or three or five of them
        question = render_mc(row["question"], letters, row["choices"]["text"])
        return single_turn(question, row["answerKey"], letters=letters)
