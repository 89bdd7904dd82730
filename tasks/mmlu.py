"""MMLU: multiple-choice questions on 57 subjects, from school to profession.

Hendrycks et al. 2020, https://arxiv.org/abs/2009.03300. Hub: cais/mmlu.
"""

from tasks.common import CategoricalTask, load_hub_dataset, render_mc, single_turn

LETTERS = ["A", "B", "C", "D"]


class MMLU(CategoricalTask):
    """Subset "all" has the splits "validation", "dev" and "test"; "auxiliary_train" has "train".

    The auxiliary training set is other collections of questions in the same format; its subject is "".
    """

    def __init__(self, subset: str, split: str, **view):
        super().__init__(**view)
        self.rows = load_hub_dataset("cais/mmlu", subset, split)

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        row = row.get("train", row)  # the auxiliary set was uploaded with each row inside a field "train"
        question = render_mc(row["question"], LETTERS, row["choices"])
        return single_turn(question, LETTERS[row["answer"]], letters=LETTERS, subject=row["subject"])
