# Two commands do all the set-up: `make run` and `make test`. Their environment is .venv.
PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= train,app,dashboard,jobs,kubeflow,dev
BIN    := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export UV_SYSTEM_CERTS := 1

.PHONY: run test serve up down smoke docs readme export clean install images locks test-images screenshots
.DEFAULT_GOAL := run

run: install          ## the main job, on drawn photos, offline
	@plant-mlops run

test: install         ## every test, two files at a time, each with a core
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

serve: install        ## the model in production, on http://127.0.0.1:8000
	@plant-mlops serve

up:                   ## everything at once, in Docker
	@docker/setup.sh

down:                 ## stops that, and keeps what it knows
	@cd docker && docker compose --profile '*' down

smoke:                ## walks a photo through it
	@cd docker && docker compose exec -T -e GRAFANA_PASSWORD="$$(sed -n 's/^GRAFANA_PASSWORD=//p' .env)" api python3 - < smoke.py

docs: install         ## the documentation site (needs Quarto)
	@command -v quarto >/dev/null || { echo "Quarto is not installed: see quarto.org, or run nbdev-install-quarto"; exit 1; }
	PYTHONPATH=tests nbdev-docs

export: install       ## notebooks → modules, README, boards, CronJobs and rules, cleaned
	nbdev-export && nbdev-clean && $(MAKE) --no-print-directory readme
	python -c 'from plant_mlops.monitor.boards import write_boards; write_boards("docker/grafana/dashboards")'
	env -u PLANT_SCHEDULES python -m plant_mlops job cronjobs > kubernetes/base/cronjobs.yaml
	env -u PLANT_SCHEDULES python -c 'from plant_mlops.core.config import settings; from plant_mlops.targets.kubernetes import late; print(late(settings()), end="")' > docker/prometheus/rules/job_table.yml
	python -c 'from plant_mlops.targets.kubernetes import rules; print(rules("docker/prometheus/rules"), end="")' > kubernetes/components/prometheus-operator/rules.yaml

readme: install
	@jupyter nbconvert --log-level=ERROR --to markdown --stdout nbs/index.ipynb | \
	  sed -E 's#\]\((core|data|registry|model|serve|jobs|monitor|targets|apps|photos|stocks|cli|bench|guides)/#](nbs/\1/#g' > README.md

# The container images, by Docker or by `make images DOCKER=podman`; airflow is made on train.
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
	@$(call lock,serve,log)
	@$(call lock,app,app)
	@$(call lock,dashboard,dashboard)
	@$(call lock,train,train log jobs kubeflow)
	@$(call lock,airflow,airflow celery)

test-images: install  ## the images, built and run (root, podman, buildah, runc, debootstrap; 40 GB)
	@python -m pytest -s tests/images.py

screenshots: install  ## the pictures of the documentation (Chromium; ten minutes)
	@python tests/screenshots.py

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
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[$(EXTRAS)]'
	@test ! -d .git || $(BIN)/nbdev-install-hooks
	@touch $@

clean:                ## everything that was made here, .venv too
	rm -rf $(VENV) .plant _docs _proc build dist *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
