# `make run` and `make test` install what they need into .venv by themselves. `make help` lists the commands.
PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= train,app,dashboard,jobs,kubeflow,dev
BIN    := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export UV_SYSTEM_CERTS := 1

.PHONY: help run modules test test-fast serve up down smoke docs readme export outputs clean install images locks test-images screenshots
.DEFAULT_GOAL := run

help:                 ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

run: install          ## ingest, train, evaluate and promote, on drawn photos, offline
	@plant-mlops run

# Two processes, each with a core; CI has three, because some tests wait for servers and alerts.
PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python -m pytest -n $(PROCESSES) --dist loadgroup --no-loadscope-reorder

test: install         ## every test; those that lack a program are skipped, and a table at the end says why
	@$(PYTEST)

test-fast: install    ## the tests that take two minutes together
	@$(PYTEST) -m "not slow"

serve: install        ## serve the model in production, on http://127.0.0.1:8000
	@plant-mlops serve

up:                   ## start all services in Docker
	@docker/setup.sh

down:                 ## stop them; their data stay
	@cd docker && docker compose --profile '*' down

smoke:                ## send a photo through the services in Docker
	@cd docker && docker compose exec -T -e GRAFANA_PASSWORD="$$(sed -n 's/^GRAFANA_PASSWORD=//p' .env)" api python3 - < smoke.py

docs: install         ## build the documentation site (needs Quarto)
	@command -v quarto >/dev/null || { echo "Quarto is not installed: see quarto.org, or run nbdev-install-quarto"; exit 1; }
	nbdev-docs

# nbdev wraps the names of `__all__` at 120 columns, and then writes `__all__ = ` before them; the last one moves down.
modules: install      ## write the modules from the notebooks
	nbdev-export && nbdev-clean
	@find plant_mlops -name '*.py' -exec sed -i -E '/^__all__ = .{111}/s/, ([^ ]+[],])$$/,\n           \1/' {} +

export: modules       ## write modules, README, Grafana boards, CronJobs and alert rules from the notebooks
	@$(MAKE) --no-print-directory readme
	python -c 'from plant_mlops.monitor.boards import write_boards; write_boards("docker/grafana/dashboards")'
	env -u PLANT_SCHEDULES python -m plant_mlops job cronjobs > kubernetes/base/cronjobs.yaml
	env -u PLANT_SCHEDULES python -c 'from plant_mlops.core.config import settings; from plant_mlops.targets.kubernetes import late_rules; print(late_rules(settings()), end="")' > docker/prometheus/rules/job_table.yml
	python -c 'from plant_mlops.targets.kubernetes import prometheus_rule; print(prometheus_rule("docker/prometheus/rules"), end="")' > kubernetes/components/prometheus-operator/rules.yaml

readme: install
	@jupyter nbconvert --log-level=ERROR --to markdown --stdout nbs/index.ipynb | \
	  sed -E 's#\]\((core|data|registry|model|serve|batch|jobs|monitor|targets|apps|photos|stocks|cli|bench|guides)/#](nbs/\1/#g' > README.md

outputs: install      ## execute a notebook and save its outputs: make outputs NB=nbs/core/00_config.ipynb
	@test -f "$(NB)" || { echo "Name a notebook: make outputs NB=nbs/core/00_config.ipynb"; exit 1; }
	jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace "$(NB)" && nbdev-clean --fname "$(NB)"

# The container images, by Docker or by `make images DOCKER=podman`; airflow is built on train.
DOCKER  ?= docker
export BUILDAH_FORMAT := docker
VERSION := $(shell sed -n 's/^version = //p' settings.ini)
images:
	@for o in serve app dashboard train airflow; do $(DOCKER) build --file docker/$$o/Dockerfile --tag plant-mlops/$$o:$(VERSION) \
	  --build-arg VERSION=$(VERSION) --build-arg REVISION="$$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
	  $$(test $$o != airflow || echo --build-arg TRAIN=plant-mlops/train:$(VERSION)) . || exit 1; done

# The newest versions that go together, with their checksums: a lock for each image, and one for what builds them.
LOCK = uv pip compile --quiet --upgrade --generate-hashes --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_36 --custom-compile-command 'make locks'
lock = $(LOCK) $(addprefix --extra=,$(2)) pyproject.toml -o docker/$(1)/requirements.lock
locks: install
	@printf 'setuptools>=77\nuv>=0.5,<1\n' | $(LOCK) - -o docker/build.lock
	@$(call lock,serve,log heic)
	@$(call lock,app,app)
	@$(call lock,dashboard,dashboard)
	@$(call lock,train,train log jobs kubeflow)
	@$(call lock,airflow,airflow celery)

test-images: install  ## build and run the images (root, podman, buildah, runc, debootstrap; 40 GB)
	@python -m pytest -s tests/images.py

screenshots: install  ## take the pictures of the documentation (Chromium; ten minutes)
	@python tests/screenshots.py

install: $(VENV)/.installed

# Installs again when the dependencies change.
$(VENV)/.installed: settings.ini setup.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V). Name another: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "No virtual environment could be made. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing into $(VENV): about 6 GB with PyTorch, a few minutes the first time"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5,<1"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[$(EXTRAS)]'
	@test ! -d .git || $(BIN)/nbdev-install-hooks
	@touch $@

clean:                ## remove what was built, .venv too
	rm -rf $(VENV) .plant _docs _proc build dist *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
