"""dev/setup.sh with a fake uv that records its arguments."""

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import write_program

ROOT = Path(__file__).parent.parent
TOOLS = ["bash", "cat", "chmod", "cksum", "cmp", "cp", "dirname", "env", "mkdir", "rm", "touch"]
UV = """
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
    """`setup(cargo=True, **variables)` runs setup.sh in a copy of the files that it reads; returns (stderr, uv's arguments)."""
    project, programs, log = tmp_path / "project", tmp_path / "programs", tmp_path / "log"
    shutil.copytree(ROOT / "rustbpe", project / "rustbpe", ignore=shutil.ignore_patterns("target", "build", "*.egg-info"))
    (project / "dev").mkdir()
    shutil.copy(ROOT / "dev/setup.sh", project / "dev")
    shutil.copy(ROOT / "pyproject.toml", project)
    write_program(programs / "uv", UV)
    write_program(programs / "python3", "exit 1")
    for tool in TOOLS:
        (programs / tool).symlink_to(shutil.which(tool))

    def run(cargo: bool, **variables):
        log.write_text("")
        if cargo:
            write_program(programs / "cargo", "")
        env = {"PATH": str(programs), "HOME": str(tmp_path), "LOG": str(log), **variables}
        done = subprocess.run(["bash", "dev/setup.sh", "cpu"], cwd=project, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stderr, log.read_text().splitlines()

    run.project = project
    return run


def is_build(line: str) -> bool:
    return line.startswith("pip install") and line.endswith("./rustbpe")


def test_rustbpe_is_built_once_and_again_after_a_change(setup):
    _, calls = setup(cargo=True)
    assert calls[:2] == ["lock -q", "sync --extra cpu"] and [is_build(line) for line in calls[2:]] == [True]
    assert setup(cargo=True) == ("", [])
    (setup.project / "rustbpe/src/bpe.rs").write_text("// changed")
    _, calls = setup(cargo=True)
    assert len(calls) == 1 and is_build(calls[0])
    with open(setup.project / "pyproject.toml", "a") as file:
        file.write("# changed\n")  # syncing the environment then restores the published rustbpe
    _, calls = setup(cargo=True)
    assert "sync --extra cpu" in calls and is_build(calls[-1])


def test_without_rust_the_published_rustbpe_is_kept_with_a_note(setup):
    errors, calls = setup(cargo=False)
    assert "no Rust toolchain" in errors and not any(map(is_build, calls))
    assert setup(cargo=False) == ("", []), "the note is printed once"
    _, calls = setup(cargo=True)  # Rust was installed in the meantime
    assert len(calls) == 1 and is_build(calls[0])


def test_without_pytorchs_index_the_configured_one_is_used_and_a_failed_build_is_retried(setup):
    errors, calls = setup(cargo=True, LOCK="1", BUILD="1")
    assert "configured package index" in errors and "could not be built" in errors
    assert any("--no-sources -r pyproject.toml --extra cpu --group dev" in line for line in calls)
    assert any(map(is_build, calls))
    _, calls = setup(cargo=True)
    assert is_build(calls[-1])
