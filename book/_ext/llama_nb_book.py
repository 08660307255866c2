"""What Jupyter Book does not know about nbdev notebooks, and what an offline book needs.

The code of a cell is never changed on its way to the kernel: `#|` lines become tags before a notebook is executed, and
disappear from the page afterwards. So fresh and stored notebooks have the same cells in the same order.
"""
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
from importlib.resources import files
from inspect import isroutine, signature
from pathlib import Path

import nbformat
from docutils import nodes
from jupyter_cache import get_cache
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from myst_parser.mdit_to_docutils.sphinx_ import SphinxRenderer
from myst_parser.parsers.mdit import create_md_parser
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective, new_document

BOOK = Path(__file__).resolve().parents[1]
ROOT = BOOK.parent
DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*\|[ \t]*(\w+)[ \t]*:?[ \t]*(.*?)[ \t]*$\n?", re.M)
TAGS = {("hide", ""): "remove-cell", ("default_exp", None): "remove-cell", ("eval", "false"): "skip-execution",
        ("echo", "false"): "remove-input", ("output", "false"): "remove-output"}

FOLDED = {"hide-cell": "the solution", "hide-input": "the code"}


def directives(source):
    """The `#|` lines of a cell, as `{name: value}`."""
    return dict(DIRECTIVE.findall(source))


def exported_module(source, default):
    """The module that a cell goes to, or None."""
    for name in ("export", "exporti", "exports"):
        if name in directives(source):
            return directives(source)[name] or default
    return None


# Notebooks: before execution ---------------------------------------------------------------------------------------

def prepare(text):
    """A notebook's JSON with its `#|` lines turned into tags, and the module that it exports to."""
    notebook, module = json.loads(text), None
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        found = directives(source)
        module = found.get("default_exp", module)
        tags = cell["metadata"].setdefault("tags", [])
        for (name, value), tag in TAGS.items():
            empty = not DIRECTIVE.sub("", source).strip()
            if name in found and (found[name].lower() == value or value is None and empty) and tag not in tags:
                tags.append(tag)
        for tag, folded in FOLDED.items():
            if tag in tags:
                prompts = {"code_prompt_show": f"Show {folded}", "code_prompt_hide": f"Hide {folded}"}
                cell["metadata"]["mystnb"] = prompts | cell["metadata"].get("mystnb", {})
    return json.dumps(notebook), module


def is_notebook(env, docname):
    return str(env.doc2path(docname)).endswith(".ipynb")


def prepare_source(app, docname, source):
    if is_notebook(app.env, docname):
        source[0], app.env.metadata[docname]["exports_to"] = prepare(source[0])
    elif docname == "book/api":
        source[0] += api_sections(app.env)


# Notebooks: the page -----------------------------------------------------------------------------------------------

def dress_cells(app, doctree):
    """Drop the `#|` lines, say above each exported cell which module it goes to, and leave of an expected error its last line."""
    default = app.env.metadata[app.env.docname].pop("exports_to", None)
    for cell in doctree.findall(nodes.container):
        if "tag_raises-exception" in cell["classes"]:
            for output in cell.findall(nodes.literal_block):
                if output.get("language") == app.config.nb_render_error_lexer:
                    replace_text(output, output.astext().rstrip().rsplit("\n\n", 1)[-1])
                    output["language"] = "text"
    for box in list(doctree.findall(nodes.container)):
        if box.get("nb_element") != "cell_code_source":
            continue
        for code in list(box.findall(nodes.literal_block)):
            source = code.astext()
            shown = DIRECTIVE.sub("", source).strip("\n")
            module = exported_module(source, default)
            replace_text(code, shown)
            if not shown:
                box.parent.remove(box)
            elif module:
                box["classes"].append("exported")
                box.insert(0, export_label(app.env, module))


def number_chapter(app, doctree):
    """`nbs/06_rope` is chapter 6: the number stands before its title, on the page and wherever that is quoted."""
    number = re.match(r"nbs/0*([1-9]\d*)_", app.env.docname)
    title = doctree.next_node(nodes.title)
    if number and number[1] and title:
        title.insert(0, nodes.Text(f"{number[1]} · "))


def replace_text(block, text):
    block.rawsource, block.children = text, []
    block += nodes.Text(text)


def export_label(env, module):
    link = addnodes.pending_xref("", nodes.inline("", f"llama_nb/{module}.py"), refdomain="py", reftype="mod",
                                 reftarget=f"llama_nb.{module}", refdoc=env.docname, refexplicit=True, refwarn=False)
    return nodes.paragraph("", "", nodes.inline("", "Exported to ", classes=["visually-hidden"]),
                           nodes.inline("", "→ "), link, classes=["export-label"])


# Execution: a cache that notices a changed package, and the executed notebooks ----------------------------------------

def cache_key():
    """Changes with the package, its data, the weights, the libraries, and outputs that are shown but not executed."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "llama_nb").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    weights = os.environ.get("LLAMA_NB_WEIGHTS", "")
    digest.update(weights.encode())
    for path in sorted([Path(weights), *Path(weights).rglob("*")]) if weights else []:
        digest.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    for library in ("tensorflow", "keras", "numpy"):
        digest.update(importlib.metadata.version(library).encode())
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf8"))["cells"]:
            if directives("".join(cell["source"])).get("eval", "").lower() == "false":
                digest.update(json.dumps(cell, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def configure(app, config):
    config.nb_execution_cache_path = str(Path(app.outdir).parent / ".jupyter_cache" / cache_key())
    config.html_static_path.append(str(BOOK / "_static"))
    config.html_css_files.append("book.css")
    sys.path.insert(0, str(ROOT))  # the book shows the package beside it, whatever is installed
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for listeners in app.events.listeners.values():  # thebe names a remote script on every page
        listeners[:] = [listener for listener in listeners if getattr(listener.handler, "__name__", "") not in ("init_thebe_core", "update_thebe_context")]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from llama_nb.files import quiet_start
    with quiet_start():  # what TensorFlow says when the API reference first imports it
        importlib.import_module("keras")
    log_kernels(Path(app.outdir).parent / "kernels.log")


def log_kernels(path):
    "What kernels and their libraries print past the notebooks goes to a file, and not between the lines of the build."
    path.parent.mkdir(parents=True, exist_ok=True)
    log, launch = open(path, "wb"), LocalProvisioner.launch_kernel

    async def launch_kernel(self, cmd, **options):
        return await launch(self, cmd, **options | dict(stdout=log, stderr=log))
    LocalProvisioner.launch_kernel = launch_kernel


def read_everything(app, env, added, changed, removed):
    """Pages that failed or warned must do so again in the next build; what was executed comes from the cache."""
    return env.found_docs


def write_executed(app, error):
    """jupyter_execute/ holds what this build's pages show, also where it came from the cache."""
    if error:
        return
    cache = get_cache(app.config.nb_execution_cache_path)
    for docname in app.env.found_docs:
        if is_notebook(app.env, docname):
            text, _ = prepare(Path(app.env.doc2path(docname)).read_text(encoding="utf8"))
            try:
                _, executed = cache.merge_match_into_notebook(nbformat.reads(text, as_version=4))
            except KeyError:
                continue
            nbformat.write(executed, Path(app.outdir).parent / "jupyter_execute" / f"{docname}.ipynb")


# API reference: docstrings are Markdown, and only our own -----------------------------------------------------------

class MarkdownDocstring(SphinxDirective):
    """The body is MyST Markdown, as in the chapters."""
    has_content = True

    def run(self):
        document = new_document(self.state.document["source"], self.state.document.settings)
        parser = create_md_parser(self.env.myst_config, SphinxRenderer)
        parser.options["document"] = document
        parser.render("\n".join(self.content))
        return document.children


def markdown_docstring(app, what, name, obj, options, lines):
    if any(lines):
        lines[:] = ["", ".. markdown-docstring::", "", *(f"   {line}" for line in lines), ""]


def only_documented(app, what, name, obj, skip, options):
    """Of a class, only what has words of its own: the fields of a dataclass are in its signature."""
    if what == "class" and not ((isroutine(obj) or isinstance(obj, property)) and obj.__doc__):
        return True


def own_signature(app, what, name, obj, options, arguments, result):
    """Keras layers define `__new__(*args, **kwargs)`: show what their `__init__` takes."""
    if what == "class" and arguments and arguments.startswith("(*"):
        own = signature(obj.__init__)
        return str(own.replace(parameters=list(own.parameters.values())[1:])), result


def api_sections(env):
    """One section a module, in reading order."""
    text = ""
    for docname in sorted(env.found_docs):
        if is_notebook(env, docname):
            path = Path(env.doc2path(docname))
            _, module = prepare(path.read_text(encoding="utf8"))
            if module and (ROOT / "llama_nb" / f"{module}.py").exists():
                text += (f"\n## `llama_nb.{module}`\n\nFrom the chapter {{doc}}`/{docname}`.\n\n```{{eval-rst}}\n"
                         f".. automodule:: llama_nb.{module}\n   :members:\n   :undoc-members:\n```\n")
    return text


# The site: nothing comes from elsewhere -----------------------------------------------------------------------------

def forget(app):
    """Pages of source code link back to the API page, so they are written anew with it; reports are those of this build."""
    for folder in ("_modules", "reports"):
        shutil.rmtree(Path(app.outdir) / folder, ignore_errors=True)


def ship_mathjax(app, error):
    if not error and app.builder.format == "html":
        target = Path(app.outdir) / "_static" / app.config.mathjax_path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files("sphinx-mathjax-offline") / "static" / app.config.mathjax_path, target)


def setup(app):
    app.add_directive("markdown-docstring", MarkdownDocstring)
    app.connect("config-inited", configure)
    app.connect("builder-inited", forget)
    app.connect("env-get-outdated", read_everything)
    app.connect("source-read", prepare_source)
    app.connect("doctree-read", number_chapter, priority=100)  # before Sphinx notes the titles
    app.connect("doctree-read", dress_cells)
    app.connect("autodoc-process-docstring", markdown_docstring)
    app.connect("autodoc-skip-member", only_documented)
    app.connect("autodoc-process-signature", own_signature)
    app.connect("build-finished", write_executed)
    app.connect("build-finished", ship_mathjax)
    return {"parallel_read_safe": True}
