# Two commands for everybody (demo, test), the rest for authors. `make help` lists them.
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= dev
DEV = $(VENV)/.$(EXTRAS)
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do $$p -c '$(SUPPORTED)' 2>/dev/null && { echo $$p; break; }; done)
INSTALL = python -m pip install --disable-pip-version-check --no-input --progress-bar off -e $(1) >$(VENV)/pip.log 2>&1 \
	|| $(call FAILED,pip could not install the package: $(WHY))
FAILED = { echo "make $@: $(1)" >&2; exit 1; }
WHY = $$(grep -aoh "ERROR: .*" $(VENV)/pip.log 2>/dev/null | grep -v present-rich | tail -n 1)
STRICT = each WARNING or ERROR above names its file and reason
DROP_STDERR = import sys, nbformat; name = sys.argv[1]; notebook = nbformat.read(name, 4); \
	[cell.update(outputs=[o for o in cell.outputs if o.get("name") != "stderr"]) for cell in notebook.cells if "outputs" in cell]; nbformat.write(notebook, name)
PYTEST = python -m pytest -n 2 --dist loadfile
BUILD = jupyter-book build . -n -W --keep-going
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo test book chapter fuzz anycpu soak sync hooks clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## install the package, fetch a small model, continue a prompt
	@llama-nb generate -m smollm2-135m-instruct -p "The best way to attract bees" -n 40 --temp 0

test: $(DEV) ## pass every test: package in step, strict book build (runs all chapters), pytest
	@echo "==> is the package in step with the notebooks?"
	@python tests/test_sync.py || $(call FAILED,the package is out of step with the notebooks; \`make sync\` mends that)
	@echo "==> pytest, beside the book's build: what does not look at the book ($(VENV)/pytest.log)"
	@trap 'kill $$tests 2>/dev/null' EXIT INT TERM; \
	$(PYTEST) tests -m "not book" >$(VENV)/pytest.log 2>&1 & tests=$$!; \
	$(MAKE) --no-print-directory book; built=$$?; \
	wait $$tests; passed=$$?; cat $(VENV)/pytest.log; \
	echo "==> pytest, the book"; $(PYTEST) tests -m book && exit $$((built || passed))

book: $(DEV) ## build book/_build/html, executing the chapters that changed
	@echo "==> building the book (executes the chapters: several minutes the first time)"
	@rm -rf book/_build/html book/_build/jupyter_execute
	@$(BUILD) --config book/_config.yml --path-output book || $(call FAILED,the book does not build: $(STRICT))
	@echo "The book: $(CURDIR)/book/_build/html/index.html"

chapter: $(DEV) ## N=06_rope: export, run the notebook in place, clean it, render its page from these outputs
	@test -f "nbs/$(N).ipynb" || $(call FAILED,which one? For example: make chapter N=06_rope (there is no nbs/$(N).ipynb))
	@echo "==> exporting"; nbdev_export || $(call FAILED,nbdev_export says the above)
	@echo "==> running nbs/$(N).ipynb"; TF_CPP_MIN_LOG_LEVEL=3 jupyter execute --inplace "nbs/$(N).ipynb" || $(call FAILED,nbs/$(N).ipynb stops with the error above)
	@python -c '$(DROP_STDERR)' "nbs/$(N).ipynb" && nbdev_clean --fname "nbs/$(N).ipynb" || $(call FAILED,cleaning nbs/$(N).ipynb says the above)
	@echo "==> rendering"; mkdir -p book/_build
	@sed -e 's|execute_notebooks: .*|execute_notebooks: "off"|' -e 's|: _ext|: ../_ext|' book/_config.yml > book/_build/page.yml
	@$(BUILD) --config book/_build/page.yml --path-output book/_build/page || $(call FAILED,the page does not build: $(STRICT))
	@echo "The page: $(CURDIR)/book/_build/page/_build/html/nbs/$(N).html"

fuzz: $(DEV) ## open 20,000 damaged files of every form: each must end well, or in one line
	@python tests/fuzz.py

anycpu: $(DEV) ## chapters and tests as other CPUs would compute them: an hour, before a release or after work on the engine
	@python tests/anycpu.py $(N)

soak: $(DEV) ## the tests of several processes, twenty times over
	@LLAMA_NB_SOAK=20 python -m pytest tests/test_scale.py -k "two_processes or dies"

sync: $(DEV) ## bring the package in step with the notebooks, and clean these
	@nbdev_export && nbdev_clean

hooks: $(DEV) ## install the git and Jupyter hooks that keep notebooks clean and the package in step
	@nbdev_install_hooks && install -m 755 .githooks/pre-commit "$$(git rev-parse --git-path hooks)/pre-commit"

clean: ## remove what was built (.venv and the per-user cache of weights stay)
	@rm -rf book/_build build dist *.egg-info

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "==> installing llama_nb and its pins into $(VENV): about 700 MB and one to five minutes the first time; $(VENV)/pip.log says more"
	@$(call INSTALL,.)
	@touch $@

$(DEV): pyproject.toml | $(BIN)/python
	@echo "==> installing llama_nb[$(EXTRAS)] into $(VENV): about 1 GB and two to six minutes the first time; $(VENV)/pip.log says more"
	@$(call INSTALL,".[$(EXTRAS)]")
	@touch $@ $(VENV)/.demo

$(BIN)/python:
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' 2>/dev/null \
	|| $(call FAILED,needs Python 3.11 to 3.13 (tensorflow 2.21 and keras 3.15 have no wheels for others); found $$($(or $(PYTHON),python3) --version 2>/dev/null || echo none). Name one with PYTHON=/path/to/python3.11)
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); $(call FAILED,$(PYTHON) -m venv failed (Debian and Ubuntu keep it in the package python3-venv)); }
