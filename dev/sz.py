"""Lines per folder and file: `python dev/sz.py`. A budget that nobody prints is soon spent.

Counts the lines of our own source in git, blank ones and comments too; data and prose are left out.
"""

from __future__ import annotations

import subprocess
from collections import defaultdict
from pathlib import Path

SOURCE = {".py", ".rs", ".sh", ".html", ".toml"}


def source_files(root: Path) -> list[Path]:
    """Source files under `root` that git has or would take, as paths relative to it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted(Path(name) for name in set(listed) if Path(name).suffix in SOURCE and (root / name).is_file())


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    folders = defaultdict(dict)  # folder -> {file name: lines}
    for path in source_files(root):
        folders[path.parent][path.name] = len((root / path).read_text(encoding="utf-8").splitlines())
    for folder, lines_of in sorted(folders.items()):
        print(f"{sum(lines_of.values()):6d}  {folder}/")
        for name, lines in sorted(lines_of.items(), key=lambda item: -item[1]):
            print(f"{lines:14d}  {name}")
    print(f"{sum(sum(lines_of.values()) for lines_of in folders.values()):6d}  in all")


if __name__ == "__main__":
    main()
