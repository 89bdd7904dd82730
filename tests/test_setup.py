"""dev/setup.sh with a fake for uv that writes down what it is asked to install."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ["bash", "cat", "chmod", "cksum", "cmp", "cp", "dirname", "env", "mkdir", "rm", "touch"]
UV = """#!/usr/bin/env bash
echo "$*" >>"$LOG"
case "$*" in
    "lock -q") exit "${LOCK:-0}" ;;
    *./rustbpe*) exit "${BUILD:-0}" ;;
esac
mkdir -p .venv/bin
echo 'exit 0' >.venv/bin/python
chmod +x .venv/bin/python
"""


@pytest.fixture
def setup(tmp_path):
    """`setup(cargo, **variables)` runs it in a copy of what it reads; gives its stderr and what uv was asked."""
    project, programs, log = tmp_path / "project", tmp_path / "programs", tmp_path / "log"
    shutil.copytree(ROOT / "rustbpe", project / "rustbpe", ignore=shutil.ignore_patterns("target", "build", "*.egg-info"))
    (project / "dev").mkdir()
    shutil.copy(ROOT / "dev/setup.sh", project / "dev")
    shutil.copy(ROOT / "pyproject.toml", project)
    programs.mkdir()
    for tool in TOOLS:
        (programs / tool).symlink_to(shutil.which(tool))
    write_program(programs / "uv", UV)
    write_program(programs / "python3", "#!/usr/bin/env bash\nexit 1\n")

    def run(cargo: bool, **variables):
        log.write_text("")
        if cargo:
            write_program(programs / "cargo", "#!/usr/bin/env bash\n")
        else:
            (programs / "cargo").unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", "dev/setup.sh", "cpu"],
            cwd=project,
            env={"PATH": str(programs), "HOME": str(tmp_path), "LOG": str(log), **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr, log.read_text().splitlines()

    run.project = project
    return run


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    os.chmod(path, 0o755)


def is_build(line: str) -> bool:
    return line.startswith("pip install") and line.endswith("./rustbpe")


def test_builds_rustbpe_once_and_again_when_it_changed(setup):
    _, asked = setup(cargo=True)
    assert asked[:2] == ["lock -q", "sync --extra cpu"] and [is_build(line) for line in asked[2:]] == [True]
    assert setup(cargo=True) == ("", [])
    (setup.project / "rustbpe/src/bpe.rs").write_text("// changed")
    _, asked = setup(cargo=True)
    assert len(asked) == 1 and is_build(asked[0])
    with open(setup.project / "pyproject.toml", "a") as file:
        file.write("# changed, and with the environment the published rustbpe came back\n")
    _, asked = setup(cargo=True)
    assert "sync --extra cpu" in asked and is_build(asked[-1])


def test_without_rust_the_published_package_stays_and_a_line_says_so(setup):
    errors, asked = setup(cargo=False)
    assert "no Rust toolchain" in errors and not any(map(is_build, asked))
    assert setup(cargo=False) == ("", [])  # told once
    _, asked = setup(cargo=True)  # Rust was installed since
    assert len(asked) == 1 and is_build(asked[0])


def test_a_build_that_fails_stops_nothing_and_is_tried_again(setup):
    errors, asked = setup(cargo=True, BUILD="1")
    assert "did not build" in errors and any(map(is_build, asked))
    _, asked = setup(cargo=True)
    assert len(asked) == 1 and is_build(asked[0])


def test_without_pytorchs_index_all_comes_from_the_configured_one(setup):
    errors, asked = setup(cargo=True, LOCK="1")
    assert "configured package index" in errors
    assert any("--no-sources -r pyproject.toml --extra cpu --group dev" in line for line in asked)
    assert is_build(asked[-1])
