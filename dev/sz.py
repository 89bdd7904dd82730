"""Lines and tokens per folder, and the budget they must stay in: `python dev/sz.py` (exit code 1 above it).

Counts all lines of our source files in git, blank lines and comments included. Tokens per line measure how dense
the Python code is; comments, docstrings and blank lines do not count there.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

PRODUCT, TESTS = 15_210, 9_450  # lines: everything but the tests; the tests. To shrink to 12,500 and 7,000
FILE = 500  # lines of one file
LARGER = {"nanochat/ui.html": 750}  # files that may be larger
TOKENS_PER_LINE = 11.35  # of the product's Python code
SOURCE = {".py", ".rs", ".sh", ".html", ".toml"}


def source_files(root: Path) -> list[str]:
    """Paths of the source files that git tracks or would track, relative to `root`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted(name for name in set(names) if Path(name).suffix in SOURCE and (root / name).is_file())


def code_tokens(text: str) -> tuple[int, int]:
    """(tokens, lines that hold any) of Python code."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    count, lines, start_of_statement = 0, set(), True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            start_of_statement = True
        if token.type in skipped:
            continue
        if not (start_of_statement and token.type == tokenize.STRING):  # a docstring
            count += 1
            lines.update(range(token.start[0], token.end[0] + 1))
        start_of_statement = False
    return count, len(lines)


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    folders = defaultdict(dict)  # folder -> {file name: lines}
    tokens = defaultdict(lambda: [0, 0])  # folder -> [tokens, lines of code]
    over = []
    for name in source_files(root):
        path = Path(name)
        text = (root / name).read_text(encoding="utf-8")
        folder, lines = str(path.parent), len(text.splitlines())
        folders[folder][path.name] = lines
        if path.suffix == ".py":
            tokens[folder] = [a + b for a, b in zip(tokens[folder], code_tokens(text))]
        if lines > LARGER.get(name, FILE):
            over.append(f"{name} has {lines} lines, more than {LARGER.get(name, FILE)}")

    for folder, files in sorted(folders.items()):
        count, code = tokens[folder]
        density = f"{count / code:5.1f} tokens per line" if code else ""
        print(f"{sum(files.values()):6d}  {folder + '/':28s}{density}")
        if "-v" in sys.argv:
            for name, lines in sorted(files.items(), key=lambda item: -item[1]):
                print(f"{lines:14d}  {name}")
    total = sum(sum(files.values()) for files in folders.values())
    tests = sum(folders["tests"].values())
    count, code = (sum(column) for column in zip(*(tokens[folder] for folder in tokens if folder != "tests")))
    print(f"{total - tests:6d}  product (at most {PRODUCT})\n{tests:6d}  tests (at most {TESTS})")
    print(f"{count / code:6.2f}  Python tokens per line of the product's code (at most {TOKENS_PER_LINE})")
    if total - tests > PRODUCT or tests > TESTS:
        over.append("the project is larger than its budget")
    if count / code > TOKENS_PER_LINE:
        over.append("the code is denser than its budget")
    if over:
        sys.exit("\n".join(f"error: {line}" for line in over))


if __name__ == "__main__":
    main()
