"""The wheel and the sdist: what is in them, and that they work where nothing but the declared dependencies is installed."""
import configparser
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llama_nb.checkpoint import LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
MODULES = {f"llama_nb/{path.name}" for path in (ROOT / "llama_nb").glob("*.py")}
BARD = {f"llama_nb/data/bard/{name}" for name in ("params.json", "consolidated.00.pth", "tokenizer.model")}
NOT_FOR_USERS = ["IPython", "jupyter_book", "matplotlib", "nbdev", "sentencepiece", "sphinx", "torch", "transformers"]


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    "The sdist built from a copy of the tracked files, and the wheel built from that sdist."
    source, dist = tmp_path_factory.mktemp("source") / "llama_nb", tmp_path_factory.mktemp("dist")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "llama_nb", source / "llama_nb", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source)
    return {"sdist": next(dist.glob("*.tar.gz")), "wheel": next(dist.glob("*.whl"))}


def dependencies(name, extras=(), found=None):
    "The distributions that pip would install for a package: its declared dependencies, theirs, and so on."
    found = {} if found is None else found
    for text in distribution(name).requires or []:
        need = Requirement(text)
        if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        key = (canonicalize_name(need.name), *sorted(need.extras))
        if key not in found:
            found[key] = distribution(need.name)
            dependencies(need.name, need.extras, found)
    return found


@pytest.fixture(scope="session", params=["wheel", "sdist"])
def elsewhere(request, built, tmp_path_factory):
    """An environment that holds the package, its declared dependencies, and nothing else.

    The dependencies are links to the installed ones; pip, without an index, checks that they are complete and of the right versions.
    """
    folder = tmp_path_factory.mktemp(request.param)
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    packages = next(folder.glob("lib/python*/site-packages"))
    for installed in dependencies("llama_nb").values():
        for part in {Path(file).parts[0] for file in installed.files} - {"..", "__pycache__"}:
            if not (packages / part).exists():
                (packages / part).symlink_to(installed.locate_file(part))
    run(sys.executable, "-m", "pip", "--python", folder, "install", "--quiet", "--no-index", "--no-build-isolation", built[request.param])
    return folder / "bin"


def test_wheel_holds_the_package_and_bard_and_nothing_else(built):
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        about = {name.split(".dist-info/")[1] for name in wheel.namelist() if ".dist-info/" in name}
    assert BARD <= names
    assert MODULES == {name for name in names if name.endswith(".py")}
    assert all(name.startswith("llama_nb/") for name in names)
    assert {"licenses/LICENSE", "licenses/NOTICE", "entry_points.txt"} <= about


def test_sdist_holds_what_the_wheel_is_built_from(built):
    with tarfile.open(built["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert MODULES | BARD | {"pyproject.toml", "README.md", "LICENSE", "NOTICE"} <= names


def test_the_books_needs_are_not_the_packages():
    needs = {name for name, *_ in dependencies("llama_nb")}
    assert not needs & {canonicalize_name(name) for name in NOT_FOR_USERS}


def test_import_is_light(elsewhere, tmp_path):
    code = f"import sys, llama_nb; print(sorted(set({NOT_FOR_USERS}) & set(sys.modules)), llama_nb.__file__)"
    imported, file = run(elsewhere / "python", "-I", "-c", code, cwd=tmp_path).split()
    assert imported == "[]" and str(elsewhere.parent) in file


def test_import_is_light_where_everything_is_installed():
    code = f"import sys, llama_nb; print(sorted(set({NOT_FOR_USERS}) & set(sys.modules)))"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "[]"


def test_command_line_writes_text_with_bard(elsewhere, tmp_path):
    arguments = ["generate", "-m", "bard", "-p", "To be, or", "-n", "8", "--temp", "0"]
    assert run(elsewhere / "llama-nb", *arguments, cwd=tmp_path).strip()


def test_tokenizer_where_tensorflow_text_has_no_wheel():
    code = f"""if 1:
        import sys
        if len(sys.argv) > 1: sys.modules["tensorflow_text"] = None
        import llama_nb
        tokenizer = llama_nb.load_tokenizer({str(ROOT / "llama_nb/data/bard")!r})
        for text in ("", "To be, or not to be", "  two  spaces", "naïve 1599 🎭\\n"):
            ids = list(map(int, tokenizer.encode(text)))
            print(ids, repr(tokenizer.decode(ids)))"""
    with_it, without = (run(sys.executable, "-c", code, *arguments, cwd=ROOT) for arguments in ([], ["without"]))
    assert with_it == without and len(without.splitlines()) == 4


# What the project says of itself in several places.

def settings():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def test_every_description_names_the_same_repository():
    url = settings()["git_url"]
    assert f"url: {url}\n" in (ROOT / "book/_config.yml").read_text()
    assert f'Source = "{url}"' in (ROOT / "pyproject.toml").read_text()
    assert f"git+{url}" in (ROOT / "README.md").read_text()


def colab_link(notebook):
    path = settings()["git_url"].removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{path}/blob/{settings()['branch']}/nbs/{notebook.name}"


every_notebook = pytest.mark.parametrize("notebook", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda path: path.stem)


@pytest.mark.book
@every_notebook
def test_colab_link(notebook):
    page = ROOT / f"book/_build/html/nbs/{notebook.stem}.html"
    if not page.exists():
        pytest.skip("the book has not been built: `make book`")
    links = set(re.findall(r'href="(https://colab[^"]*)"', page.read_text("utf-8")))
    assert links == {colab_link(notebook)}


@every_notebook
def test_colab_installs_the_package_first(notebook):
    first = json.loads(notebook.read_text("utf-8"))["cells"][:4]
    install = [source for source in ("".join(cell["source"]) for cell in first) if "google.colab" in source]
    assert len(install) == 1, "one of the first cells installs the package where the notebook runs in Colab"
    assert "#| hide" in install[0] and f"git+{settings()['git_url']}" in install[0]


SIZE = re.compile(r"\| (.+?) \| (\d+) \| (\d+) \| (\d+) \((\d+)\) \| (\d+) \| (\d+) \| (yes|no) \| ([\d,]+) \|")


@pytest.mark.parametrize("row", SIZE.findall((ROOT / "book/families.md").read_text("utf-8")), ids=lambda row: row[0])
def test_the_table_of_sizes_adds_up(row):
    names = "dim n_layers n_heads n_kv_heads hidden_dim vocab_size".split()
    config = LlamaConfig(**dict(zip(names, map(int, row[1:7]))), tied=row[7] == "yes")
    assert config.n_parameters == int(row[8].replace(",", ""))
