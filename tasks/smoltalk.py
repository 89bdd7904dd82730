"""SmolTalk: general conversations, the bulk of what the model learns to chat from.

The "smol" selection, for models as small as ours. Allal et al. 2025, https://arxiv.org/abs/2502.02737.
Hub: HuggingFaceTB/smol-smoltalk.
"""

from tasks.common import Task, check_conversation, load_hub_dataset


class SmolTalk(Task):
    """`split` is "train" or "test". A conversation may begin with a system message."""

    examples = ("Who are you?", "Why is the sky blue?")

    def __init__(self, split: str, **view):
        super().__init__(**view)
        self.rows = load_hub_dataset("HuggingFaceTB/smol-smoltalk", None, split)

    def get_example(self, index: int) -> dict:
        return check_conversation({"messages": self.rows[index]["messages"]})
