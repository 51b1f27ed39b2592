# Two commands do all the set-up: `make run` and `make test`. Their environment is .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export UV_SYSTEM_CERTS := 1

.PHONY: run test serve docs readme export clean install
.DEFAULT_GOAL := run

run: install          ## the main job, on drawn photos, offline
	@plant-mlops run

test: install         ## every test, two files at a time
	@OMP_WAIT_POLICY=passive python -m pytest -n 2 --dist loadfile

serve: install        ## the model in production, on http://127.0.0.1:8000
	@plant-mlops serve

docs: install         ## the documentation site (needs Quarto)
	@command -v quarto >/dev/null || { echo "Quarto is not installed: see quarto.org, or run nbdev-install-quarto"; exit 1; }
	nbdev-docs

export: install       ## notebooks → modules and README, cleaned
	nbdev-export && nbdev-clean && $(MAKE) --no-print-directory readme

readme: install
	@jupyter nbconvert --log-level=ERROR --to markdown --stdout nbs/index.ipynb | \
	  sed -E 's#\]\(((data|model|serve|ops|jobs|apps|bench)/|00_)#](nbs/\1#g' > README.md

install: $(VENV)/.installed

# Only a change of what the package needs installs again.
$(VENV)/.installed: settings.ini setup.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V). Name another: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "No virtual environment could be made. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing into $(VENV): about 6 GB with PyTorch, a few minutes the first time"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5,<1"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[train,app,jobs,kubeflow,dev]'
	@test ! -d .git || $(BIN)/nbdev-install-hooks
	@touch $@

clean:                ## everything that was made here, .venv too
	rm -rf $(VENV) .plant _docs _proc build dist *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
