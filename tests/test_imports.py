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
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings a copy
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
OURS = ("nanochat", "tasks", "scripts")
# Used where they happen to be installed, found with find_spec, never required.
OPTIONAL = {"cudnn", "flash_attn", "flash_attn_interface", "kernels", "triton"}


MODULES = {f"{top}.{path.stem}": path for top in OURS for path in sorted((ROOT / top).glob("[!_]*.py"))}
SCRIPTS = [name for name in MODULES if name.startswith("scripts.")]


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

LEAVES = {"cpu", "fp8", "calculator", "execution", "sandbox", "core_eval", "hf_model", "report", "sample_world"}
USERS_OF_LEAVES = {  # modules of the package that may import a leaf, and which
    "dataset": {"sample_world"}, "device": {"cpu"}, "training": {"report"}, "engine": {"calculator"}, "execution": {"sandbox"},
}  # fmt: skip
SERVING = {"engine", "scheduler", "engine_thread", "server"}
USERS_OF_SERVING = {"loss_eval", "reinforce", "task_eval"}  # of engine and scheduler only


def test_imports_point_down():
    """tasks may import nanochat, and scripts both; nothing imports a script."""
    above = {"nanochat": ("tasks", "scripts"), "tasks": ("scripts",), "scripts": ("scripts",)}
    for name in MODULES:
        assert not [n for n in our_imports(name) if n.split(".")[0] in above[name.split(".")[0]]], name
    assert not our_imports("nanochat.common")


def test_the_model_imports_neither_data_nor_files_nor_scripts():
    reached, todo = set(), ["nanochat.gpt"]
    while todo:
        reached |= (new := our_imports(todo.pop()) - reached)
        todo += new
    attention = {"nanochat.flash_attention", "nanochat.decode_attention"}
    assert reached <= {"nanochat.common", "nanochat.cross_entropy", *attention}


def test_the_engine_does_not_import_the_model():
    assert not our_imports("nanochat.engine") & {"nanochat.gpt", "nanochat.checkpoint_manager", "nanochat.tokenizer"}


def test_only_scripts_and_tasks_import_leaves_and_the_core_does_not_import_the_server():
    """Except for the few modules that are named above."""
    for name in MODULES:
        top, _, module = name.rpartition(".")
        if top == "nanochat":
            used = {imported.removeprefix("nanochat.") for imported in our_imports(name)} - {module}
            assert used & LEAVES <= USERS_OF_LEAVES.get(module, set()), f"{module} imports a leaf"
            allowed = SERVING if module in SERVING else {"engine", "scheduler"} if module in USERS_OF_SERVING else set()
            assert used & SERVING <= allowed, f"{module} imports the server"


def test_no_cycles():
    """Also among imports inside functions: a module that comes later in the order may import the earlier ones only."""
    rest = set(MODULES)
    while rest:
        ready = {name for name in rest if not our_imports(name) & rest - {name}}
        assert ready, f"these import one another in a circle, or depend on one that does: {sorted(rest)}"
        rest -= ready


def test_only_common_reads_the_environment():
    for name, path in MODULES.items():
        if name != "nanochat.common":
            source = ast.unparse(tree_of(path))
            assert not re.search(r"\bos\.(environ|getenv)|from os import .*(environ|getenv)", source), name


# -----------------------------------------------------------------------------
# Declared packages


def declared_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras, groups = project["project"]["optional-dependencies"].values(), project["dependency-groups"].values()
    requirements = sum([*extras, *groups], project["project"]["dependencies"])
    return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}


def imported_packages():
    """{package: one file that imports it} for third-party imports of everything in the repository."""
    distributions = packages_distributions()
    found = {}
    for path in sorted(p for folder in (*OURS, "tests", "dev") for p in (ROOT / folder).rglob("*.py")):
        local = {p.stem for p in path.parent.glob("*.py")} | {*OURS, "dev"}
        for name in imports_of(path):
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top not in local | OPTIONAL:
                found[distributions.get(top, [top])[0].lower().replace("_", "-")] = path.relative_to(ROOT)
    return found


def test_the_declared_packages_are_those_that_are_imported():
    declared, imported = declared_packages(), imported_packages()
    imported.pop("tomli", None)  # comes with pytest where Python has no tomllib
    assert not {package: str(path) for package, path in imported.items() if package not in declared}
    assert declared <= set(imported)


# -----------------------------------------------------------------------------
# Scripts


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_defines_main_and_runs_nothing_when_imported(name):
    tree = tree_of(MODULES[name])
    mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert [ast.unparse(node.args) for node in mains] == ["argv=None"]
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    run_script(main)"
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    assert ast.get_docstring(tree) and all(isinstance(node, allowed) for node in tree.body[1:-1])


# -----------------------------------------------------------------------------
# Effects

WATCH = """
import contextlib, importlib, json, os, random, signal, sys

first, modules, run_help, heavy = json.loads(sys.argv[1])
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
    if "torch" in first:
        torch = sys.modules["torch"]
        state += [torch.get_rng_state().tolist(), torch.get_num_threads(), str(torch.get_default_dtype()),
                  torch.get_float32_matmul_precision(), torch.is_grad_enabled(), torch.cuda.is_initialized()]
    return state

sys.addaudithook(watch)
before, found = ambient(), {}
for name in modules:
    loaded = set(sys.modules)
    module = importlib.import_module(name)
    if run_help:
        with contextlib.suppress(SystemExit):
            module.main(["--help"])
    pulled = {new.split(".")[0] for new in set(sys.modules) - loaded} & set(heavy)
    effects += [f"imports {package}" for package in pulled] + ["changes the state"] * (ambient() != before)
    found[name] = effects[:]
    effects.clear()
print("\\n" + json.dumps(found))
"""

HEAVY = {"torch", "datasets", "transformers", "wandb", "matplotlib", "pyarrow", "pandas", "tiktoken", "rustbpe"}
# Modules that need no tensor must load without torch: its import alone takes seconds.
LIGHT = "common schedule calculator execution sandbox conversation dataset tokenizer sample_world report".split()
WITHOUT_TORCH = [name for name in MODULES if not name.startswith("nanochat.") or name.split(".")[1] in LIGHT]


@pytest.mark.parametrize("first, modules, run_help, heavy", [
    ([], WITHOUT_TORCH, False, HEAVY),
    ([], [*SCRIPTS, "nanochat.dataset", "nanochat.report"], True, HEAVY),
    (["torch", "numpy", "tqdm"], [name for name in MODULES if name not in WITHOUT_TORCH], False,
     {"datasets", "transformers", "wandb", "matplotlib", "pandas", *OPTIONAL}),
], ids=["light modules", "--help", "the others, once torch is loaded"])  # fmt: skip
def test_importing_has_no_effect_and_imports_nothing_heavy(tmp_path, first, modules, run_help, heavy):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"NANOCHAT_BASE_DIR": str(tmp_path / "base"), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", WATCH, json.dumps([first, modules, run_help, sorted(heavy)])]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not {name: seen for name, seen in json.loads(done.stdout.splitlines()[-1]).items() if seen}
    assert not list(tmp_path.iterdir()), "something was written"
