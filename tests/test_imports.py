"""The shape of the code: imports point one way, and importing does nothing.

Layers are read from the source. Effects are watched in fresh processes with an audit hook, which Python calls before it
opens, connects or starts anything.
"""

import ast
import json
import os
import re
import subprocess
import sys
from functools import lru_cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings a copy
    import tomli as tomllib

OURS = ("nanochat", "tasks", "scripts")
# Used where they are installed, never required
OPTIONAL = {"cudnn", "flash_attn", "flash_attn_interface", "kernels"}

MODULES = {f"{top}.{path.stem}": path for top in OURS for path in sorted((ROOT / top).glob("[!_]*.py"))}


@lru_cache(maxsize=None)
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path):
    """Dotted names that a file imports anywhere: nanochat.report for `from nanochat import report`."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; write the full name"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside & set(MODULES) or {node.module}
    return names


def our_imports(name):
    return {n for n in imports_of(MODULES[name]) if n.split(".")[0] in OURS}


# -----------------------------------------------------------------------------
# Layers

LEAVES = {"fp8", "calculator", "execution", "sandbox", "core_eval", "hf_model", "report", "sample_world"}
SERVING = {"engine", "scheduler", "engine_thread", "api", "server"}
ALLOWED = {  # what modules of the package may import of these
    "dataset": {"sample_world"}, "training": {"report"}, "execution": {"sandbox"},
    "loss_eval": {"engine"}, "reinforce": {"scheduler"}, "task_eval": {"scheduler"},
    "engine": {"calculator", *SERVING}, "scheduler": SERVING, "engine_thread": SERVING, "api": SERVING, "server": SERVING,
}  # fmt: skip


def test_imports_point_down():
    """tasks may import nanochat, and scripts both; nothing imports a script; of the package only ALLOWED imports leaves."""
    above = {"nanochat": ("tasks", "scripts"), "tasks": ("scripts",), "scripts": ("scripts",)}
    for name in MODULES:
        top, _, module = name.rpartition(".")
        assert not [n for n in our_imports(name) if n.split(".")[0] in above[top]], name
        if top == "nanochat":
            used = {imported.removeprefix("nanochat.") for imported in our_imports(name)} - {module}
            assert used & (LEAVES | SERVING) <= ALLOWED.get(module, set()), name
    assert not our_imports("nanochat.common")
    assert not our_imports("nanochat.engine") & {"nanochat.gpt", "nanochat.checkpoint_manager", "nanochat.tokenizer"}
    # No cycles, imports inside functions included
    TopologicalSorter({name: our_imports(name) - {name} for name in MODULES}).prepare()


def test_the_model_imports_neither_data_nor_files_nor_scripts():
    reached, todo = set(), ["nanochat.gpt"]
    while todo:
        reached |= (new := our_imports(todo.pop()) - reached)
        todo += new
    attention = {"nanochat.flash_attention", "nanochat.decode_attention"}
    assert reached <= {"nanochat.common", "nanochat.cross_entropy", *attention}


def test_only_common_reads_the_environment():
    for name, path in MODULES.items():
        if name != "nanochat.common":
            source = ast.unparse(tree_of(path))
            assert not re.search(r"\bos\.(environ|getenv)|from os import .*(environ|getenv)", source), name


# -----------------------------------------------------------------------------
# Declared packages


def imported_packages():
    """Third-party packages that anything in the repository imports."""
    distributions, found = packages_distributions(), set()
    for path in [p for folder in (*OURS, "tests", "dev") for p in (ROOT / folder).rglob("*.py")]:
        ours = {p.stem for p in path.parent.glob("*.py")} | {*OURS, "dev"}
        tops = {name.split(".")[0] for name in imports_of(path)} - ours - OPTIONAL - sys.stdlib_module_names
        found |= {distributions.get(top, [top])[0].lower().replace("_", "-") for top in tops}
    return found


def test_the_declared_packages_are_those_that_are_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras, groups = project["project"]["optional-dependencies"].values(), project["dependency-groups"].values()
    requirements = sum([*extras, *groups], project["project"]["dependencies"])
    declared = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}
    assert declared == imported_packages() - {"tomli"}  # which comes with pytest where Python has no tomllib


# -----------------------------------------------------------------------------
# Scripts


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("scripts.")])
def test_a_script_defines_main_and_runs_nothing_else(name):
    tree = tree_of(MODULES[name])
    mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert [ast.unparse(node.args) for node in mains] == ["argv=None"]
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    run_script(main)"


# -----------------------------------------------------------------------------
# Effects

WATCH = """
import contextlib, importlib, json, os, random, signal, sys

first, modules, heavy = json.loads(sys.argv[1])
for name in first:  # third-party packages, whose own effects are not ours
    importlib.import_module(name)

effects = []

def watch(event, args):
    if event == "open" and isinstance(args[0], str) and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        effects.append(f"opens {args[0]} for writing")
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.putenv", "subprocess.Popen", "os.system", "os.fork",
                   "socket.connect", "socket.getaddrinfo", "socket.bind", "_thread.start_new_thread"):
        effects.append(f"{event} {args}")

def ambient():
    state = [dict(os.environ), os.getcwd(), sys.path[:], sys.argv[:], random.getstate()]
    state += [repr(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    if torch := sys.modules.get("torch"):
        state += [torch.get_rng_state().tolist(), torch.get_num_threads(), str(torch.get_default_dtype()),
                  torch.get_float32_matmul_precision(), torch.is_grad_enabled(), torch.cuda.is_initialized()]
    return state

sys.addaudithook(watch)
before = ambient()
for name in modules:
    module = importlib.import_module(name)
    if name.startswith("scripts.") or name in ("nanochat.dataset", "nanochat.report"):
        with contextlib.suppress(SystemExit):
            module.main(["--help"])
    effects += [f"imports {package}" for package in heavy if package in sys.modules and package not in first]
    if effects or ambient() != before:
        sys.exit(f"{name}: {effects or 'changes the state'}")
"""

HEAVY = ["datasets", "transformers", "wandb", "matplotlib", "pandas", *OPTIONAL]
# Modules that need no tensor must load without torch: its import alone takes seconds.
LIGHT = "common schedule calculator execution sandbox conversation dataset tokenizer sample_world report".split()
WITHOUT_TORCH = [name for name in MODULES if not name.startswith("nanochat.") or name.split(".")[1] in LIGHT]


@pytest.mark.parametrize("first, modules, heavy", [
    ([], WITHOUT_TORCH, [*HEAVY, "torch", "pyarrow", "tiktoken", "rustbpe"]),
    (["torch", "numpy", "tqdm"], [name for name in MODULES if name not in WITHOUT_TORCH], HEAVY),
], ids=["light modules and --help", "the others, once torch is loaded"])  # fmt: skip
def test_importing_has_no_effect_and_imports_nothing_heavy(tmp_path, first, modules, heavy):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)}
    env["NANOCHAT_BASE_DIR"] = str(tmp_path / "base")
    command = [sys.executable, "-c", WATCH, json.dumps([first, modules, heavy])]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir()), "something was written"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_project_stays_in_its_budget_of_lines():
    done = subprocess.run([sys.executable, "dev/sz.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
