"""Compare our tokenizer with GPT-2's and GPT-4's by bytes of text per token.

    python -m scripts.tok_eval
    python -m scripts.tok_eval --source sample

More bytes per token mean shorter sequences for the same text. GPT-2 has 50,257 tokens and GPT-4
100,277, so they should win on text unlike our training data (Korean, code); on similar text ours
should keep up. tiktoken downloads the two vocabularies; without a network only ours is measured.
"""

from nanochat import flags
from nanochat.common import UserError, ranks, run_script

TEXTS = {
    "news": """
RIVERTON, March 14 - The city council voted 7-2 on Tuesday evening to rebuild the 94-year-old Mill Street
bridge, ending a dispute that had divided the town since last spring's flood. Construction is expected to cost
$18.6 million, two thirds of which will come from the state's transport fund, and to take at least 26 months.
"We could patch it for a fifth time, or we could do right by our grandchildren," said Mayor Elena Whitcombe,
who broke with her own party to support the plan. Shop owners along the west bank said they feared losing
customers during the closure; the council promised a footbridge and free parking.
""",
    "Korean": """
지난 주말 서울에는 올해 첫눈이 내렸다. 아침 일찍 눈을 뜬 아이들은 창밖을 보고 소리를 질렀고, 어른들은 출근길을 걱정했다.
기상청은 이번 눈이 평년보다 열흘쯤 빠르다고 설명했다. 시장에서 만난 한 상인은 “눈이 오면 손님은 줄지만 따뜻한 어묵 국물을
찾는 사람은 늘어난다”며 웃었다. 오후가 되자 햇볕이 나면서 길 위의 눈은 거의 녹았지만, 한강 공원에는 눈사람을 만드는 가족들의
발길이 저녁까지 이어졌다.
""",
    "code": '''
class RollingMedian:
    """Median of the last `size` numbers, in O(size) per update."""

    def __init__(self, size: int = 101):
        if size < 1:
            raise ValueError(f"size must be positive, got {size}")
        self.window = deque(maxlen=size)

    def update(self, value: float) -> float:
        self.window.append(value)
        ordered = sorted(self.window)
        middle = len(ordered) // 2
        if len(ordered) % 2 == 1:
            return ordered[middle]
        return (ordered[middle - 1] + ordered[middle]) / 2
''',
    "math": r"""
\begin{theorem} For every integer $n \ge 1$ we have $\sum_{k=1}^{n} (2k - 1) = n^2$. \end{theorem}
\begin{proof} We use induction on $n$. For $n = 1$ both sides equal $1$. Suppose that the claim holds for some
$n$. Then \[ \sum_{k=1}^{n+1} (2k-1) = n^2 + (2(n+1) - 1) = n^2 + 2n + 1 = (n+1)^2, \] which is the claim for
$n + 1$. \end{proof}
\begin{example} The derivative of $f(x) = x^3 - 6x^2 + 11x - 6$, $f'(x) = 3x^2 - 12x + 11$, vanishes at
$x_{1,2} = 2 \pm \frac{1}{\sqrt{3}} \approx 2 \pm 0.57735$, and $\int_1^3 f(x)\,dx = 0$ by symmetry. \end{example}
""",
    "science": """
Photosynthesis converts the energy of light into chemical energy stored in carbohydrates. In the light-dependent
reactions, which take place in the thylakoid membranes of the chloroplast, chlorophyll absorbs photons with
wavelengths near 430 nm and 660 nm; the excited electrons pass along a transport chain, pump protons across the
membrane and finally reduce NADP+ to NADPH. The resulting electrochemical gradient drives ATP synthase. In the
Calvin cycle the enzyme RuBisCO fixes carbon dioxide: six turns of the cycle consume 18 ATP and 12 NADPH to yield
one molecule of glucose (C6H12O6).
""",
}
BASELINES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}


def main(argv=None):
    parser = flags.make_parser(__doc__)
    parser.add_argument("--source", default="climbmix", help="source of the train and val text, as in tok_train")
    args = parser.parse_args(argv)
    if ranks()[0] > 0:
        return  # under torchrun the main rank does all the work

    from nanochat import report
    from nanochat.dataset import read_row_groups, split_paths
    from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

    tokenizers = {"ours": get_tokenizer()}
    for name, published in BASELINES.items():
        try:
            tokenizers[name] = RustBPETokenizer.from_pretrained(published)
        except UserError as error:
            print(f"skipped {name}: {error}", flush=True)
    texts = {name: text.strip() for name, text in TEXTS.items()}
    for split in ("train", "val"):
        try:
            _, documents = next(read_row_groups(split_paths(args.source, split)[0]), (0, []))
            texts[split] = "\n".join(filter(None, documents))
        except UserError as error:
            print(f"skipped the {split} text: {error}", flush=True)

    # A table with a row for each text; it and the report have the same numbers
    print("\nbytes per token (more is better); in brackets, ours relative to it")
    print(f"{'text':<10}{'bytes':>12}" + "".join(f"{name:>18}" for name in tokenizers))
    print(f"{'vocabulary':<22}" + "".join(f"{tokenizer.get_vocab_size():>18,}" for tokenizer in tokenizers.values()))
    results = {f"vocabulary of {name}": tokenizer.get_vocab_size() for name, tokenizer in tokenizers.items()}
    for text_name, text in texts.items():
        if not text:
            continue
        ratios = {name: bytes_per_token(tokenizer, text) for name, tokenizer in tokenizers.items()}
        ours = ratios.pop("ours")
        cells = "".join(f"{ratio:>9.2f} ({ours / ratio - 1:+6.1%})" for ratio in ratios.values())
        print(f"{text_name:<10}{len(text.encode()):>12,}{ours:>18.2f}{cells}")
        results |= {f"{text_name}: bytes per token of {name}": round(x, 3) for name, x in {"ours": ours, **ratios}.items()}
    report.log("Tokenizer evaluation", results)


def bytes_per_token(tokenizer, text: str) -> float:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text, "encoding and decoding changed the text"
    return len(text.encode()) / len(ids)


if __name__ == "__main__":
    run_script(main)
