"""dev/setup.sh with a fake uv that records its arguments."""

import shutil
import subprocess

import pytest
from conftest import ROOT, write_program

TOOLS = ["bash", "cat", "chmod", "cksum", "cmp", "cp", "dirname", "env", "mkdir", "rm", "touch"]
BUILD = "--reinstall-package rustbpe ./rustbpe"
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
    """`setup(cargo=True, **variables)` runs setup.sh in tmp_path / "project"; returns (stderr, uv's arguments)."""
    project, programs, log = tmp_path / "project", tmp_path / "programs", tmp_path / "log"
    shutil.copytree(ROOT / "rustbpe", project / "rustbpe", ignore=shutil.ignore_patterns("target", "build", "*.egg-info"))
    for name in ("dev/setup.sh", "pyproject.toml"):
        (project / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, project / name)
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

    return run


def test_rustbpe_is_built_once_and_again_after_a_change(setup, tmp_path):
    _, (lock, sync, build) = setup(cargo=True)
    assert (lock, sync) == ("lock -q", "sync --extra cpu") and BUILD in build
    assert setup(cargo=True) == ("", [])
    (tmp_path / "project/rustbpe/src/bpe.rs").write_text("// changed")
    assert setup(cargo=True) == ("", [build])
    with open(tmp_path / "project/pyproject.toml", "a") as file:
        file.write("# changed\n")  # syncing the environment then restores the published rustbpe
    assert setup(cargo=True)[1] == [lock, sync, build]


def test_without_rust_the_published_rustbpe_is_kept_with_a_note(setup):
    errors, calls = setup(cargo=False)
    assert "no Rust toolchain" in errors and BUILD not in "".join(calls)
    assert setup(cargo=False) == ("", []), "the note is printed once"
    assert BUILD in setup(cargo=True)[1][0]  # Rust was installed in the meantime


def test_without_pytorchs_index_the_configured_one_is_used_and_a_failed_build_is_retried(setup):
    errors, calls = setup(cargo=True, LOCK="1", BUILD="1")
    assert "configured package index" in errors and "could not be built" in errors
    assert any("--no-sources -r pyproject.toml --extra cpu --group dev" in line for line in calls)
    assert BUILD in calls[-1] and BUILD in setup(cargo=True)[1][-1]
