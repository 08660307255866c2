"""The package is what the notebooks export, and the notebooks are clean.

Run as a program, it prints what is out of step and exits 1: so `make test` starts, and so the git hook decides.
"""
import difflib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HAND_WRITTEN = {"__init__.py"}


def run_nbdev(command, folder):
    code = f"from nbdev.{'doclinks' if command == 'nbdev_export' else 'clean'} import {command}; {command}()"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} failed: {done.stderr.strip().splitlines()[-1]}")


def tracked(root):
    "What nbdev may write: the modules and the notebooks, as path → text."
    paths = [*root.glob("llama_nb/*.py"), *root.glob("nbs/*.ipynb")]
    return {str(path.relative_to(root)): path.read_text("utf-8") for path in paths}


def out_of_step(root):
    "Export and clean a copy of the project; one line for each file that is not as nbdev makes it."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("settings.ini", "pyproject.toml"):
            shutil.copy(root / name, copy)
        for name in ("nbs", "llama_nb"):
            shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
        before = tracked(copy)
        for path in copy.glob("llama_nb/*.py"):
            if path.name not in HAND_WRITTEN:
                path.unlink()
        run_nbdev("nbdev_export", copy)
        run_nbdev("nbdev_clean", copy)
        after = tracked(copy)
        written = {str(path.relative_to(copy)) for path in copy.iterdir()} - {"settings.ini", "pyproject.toml", "nbs", "llama_nb"}
        same_project = (copy / "pyproject.toml").read_bytes() == (root / "pyproject.toml").read_bytes()

    problems = [f"{name}: nbdev_export left this behind" for name in sorted(written)]
    if not same_project:
        problems.append("pyproject.toml: nbdev_export rewrites it (update_pyproject in settings.ini)")
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            problems.append(f"{name}: no notebook exports it")
        elif name not in before:
            problems.append(f"{name}: exported by a notebook, but missing")
        elif before[name] != after[name]:
            what = "not clean" if name.endswith(".ipynb") else "not what its notebook exports"
            problems.append(f"{name}: {what}: {first_difference(before[name], after[name])}")
    return problems


def first_difference(old, new):
    changed = [line for line in difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
               if line[:3] not in ("---", "+++", "@@ ")]
    return " / ".join(line[:100] for line in changed[:2])


def untidy(notebook):
    "What a reader of the stored notebook should not meet: errors that nobody asked for, and what was printed to stderr."
    problems = []
    for number, cell in enumerate(notebook["cells"], 1):
        tags = cell["metadata"].get("tags", [])
        if re.search(r"^#\s*\|\s*eval:\s*false", "".join(cell["source"]), re.M) and "skip-execution" not in tags:
            problems.append(f"cell {number} says `#| eval: false` but lacks the tag `skip-execution`, so tools other than nbdev run it")
        for output in cell.get("outputs", []):
            if output["output_type"] == "error" and "raises-exception" not in tags:
                problems.append(f"cell {number} stores an error: {output['ename']}: {output['evalue']}")
            if output.get("name") == "stderr" and "measured" not in tags:
                problems.append(f"cell {number} stores stderr: {''.join(output['text'])[:80]!r}")
    return problems


def test_package_in_step_with_notebooks():
    assert out_of_step(ROOT) == []


def test_stored_notebooks_are_tidy():
    notebooks = sorted((ROOT / "nbs").glob("*.ipynb"))
    assert notebooks
    problems = [f"{path.name} {problem}" for path in notebooks for problem in untidy(json.loads(path.read_text("utf-8")))]
    assert problems == []


def test_versions_agree():
    import configparser
    import llama_nb
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    assert llama_nb.__version__ == settings["DEFAULT"]["version"]


def a_project(folder):
    "A project with one clean notebook in step with its module."
    (folder / "nbs").mkdir()
    (folder / "llama_nb").mkdir()
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    cells = ["#| default_exp one", "#| export\ndef one(): return 1"]
    notebook = {"cells": [{"cell_type": "code", "id": f"cell{i}", "execution_count": None, "metadata": {}, "outputs": [], "source": [source]}
                          for i, source in enumerate(cells)],
                "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "nbs/00_one.ipynb").write_text(json.dumps(notebook))
    run_nbdev("nbdev_export", folder)
    run_nbdev("nbdev_clean", folder)
    return folder


def test_a_clean_project_is_in_step(tmp_path):
    assert out_of_step(a_project(tmp_path)) == []


def test_each_way_to_be_out_of_step_is_found(tmp_path):
    project = a_project(tmp_path)
    module, notebook = project / "llama_nb/one.py", project / "nbs/00_one.ipynb"
    module.write_text(module.read_text() + "\nedited_by_hand = True\n")
    (project / "llama_nb/orphan.py").write_text("")
    notebook.write_text(notebook.read_text().replace('"execution_count": null', '"execution_count": 7', 1))
    found = out_of_step(project)
    assert [line.split(": ")[:2] for line in found] == [
        ["llama_nb/one.py", "not what its notebook exports"],
        ["llama_nb/orphan.py", "no notebook exports it"],
        ["nbs/00_one.ipynb", "not clean"]]


if __name__ == "__main__":
    problems = out_of_step(ROOT)
    print("\n".join(problems) or "The package is in step with the notebooks.")
    sys.exit(bool(problems))
