"""MMLU: multiple-choice questions on 57 subjects, from school to profession.

Hendrycks et al. 2020, https://arxiv.org/abs/2009.03300. Hub: cais/mmlu.
"""

from __future__ import annotations

from tasks.common import CategoricalTask, load_hub_dataset, render_mc

LETTERS = ("A", "B", "C", "D")


class MMLU(CategoricalTask):
    """Subset "all" has the splits "validation", "dev" and "test"; "auxiliary_train" has "train".

    The auxiliary training set is other collections of questions in the same format; its subject is "".
    """

    def __init__(self, subset: str, split: str, **view):
        super().__init__(**view)
        splits = {"all": ("validation", "dev", "test"), "auxiliary_train": ("train",)}
        assert split in splits.get(subset, ()), f"{subset}, {split}"
        self.rows = load_hub_dataset("cais/mmlu", subset, split)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        row = row.get("train", row)  # the auxiliary set was uploaded with each row inside a field "train"
        return {
            "messages": [
                {"role": "user", "content": render_mc(row["question"], LETTERS, row["choices"])},
                {"role": "assistant", "content": LETTERS[row["answer"]]},
            ],
            "letters": list(LETTERS),
            "subject": row["subject"],
        }
