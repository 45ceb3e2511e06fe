# Every verb of the project; `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?=
BENCH ?=
PROOF ?=
export RAY_USAGE_STATS_ENABLED ?= 0

.DEFAULT_GOAL := help
.PHONY: help setup demo test faults fuzz bench-ingest bench-stream bench-floor bench-model bench-ablation bench-step bench-page bench-serve bench-train bench-size bench-scale bench-commits image-proof test-quick check format lock clean

help:  ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

setup: $(VENV)/.ready  ## make the virtual environment and install the locked dependencies

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "somaflow needs Python 3.11, 3.12 or 3.13 (tiledbsoma has no wheels for others); this is %d.%d: set PYTHON=/path/to/python3.13" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the locked dependencies into $(VENV): some minutes the first time"
	$(BIN)/python -m pip install --disable-pip-version-check -qq -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check -qq --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup  ## run the whole road on this machine: ingest, snapshot, train, serve, ask
	$(BIN)/python infra/demo.py $(DEMO)

test: setup  ## run all tests, in two processes
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

faults: setup  ## kill workers, readers and drivers at 300 random moments (an hour)
	SOMAFLOW_FAULTS=300 $(BIN)/python -m pytest tests/test_ingest_faults.py

fuzz: setup  ## send the server 100,000 damaged bodies of every form (an hour)
	SOMAFLOW_FUZZ=$(or $(SOMAFLOW_FUZZ),100000) $(BIN)/python -m pytest -s --timeout 0 -o faulthandler_timeout=0 tests/test_serve_fuzz.py

bench-ingest: setup  ## speed and memory of an ingestion against tiledbsoma.io.from_h5ad (20 minutes, 10 GB in build/)
	PYTHONPATH=tests/bench $(BIN)/python tests/bench/bench_ingest.py $(BENCH)

bench-stream: setup  ## speed of the stream against its peers (20 minutes, 10 GB in build/)
	PYTHONPATH=tests/bench $(BIN)/python tests/bench/bench_stream.py $(BENCH)

bench-floor: setup  ## baselines, replicates and gates on the public data beside the checkout (5 minutes)
	PYTHONPATH=tests:tests/bench $(BIN)/python tests/bench/bench_floor.py $(BENCH)

bench-model: setup  ## the model and the transition head against floor and replicate, on public and simulated data (an hour)
	PYTHONPATH=tests:tests/bench $(BIN)/python tests/bench/bench_floor.py --model $(BENCH)

bench-ablation: setup  ## one part of the model changed at a time (half an hour)
	PYTHONPATH=tests:tests/bench $(BIN)/python tests/bench/bench_ablation.py $(BENCH)

bench-step: setup  ## milliseconds of a training step by size, tokens and attention, and MFU on a GPU
	PYTHONPATH=. $(BIN)/python tests/bench/bench_step.py $(BENCH)

bench-page: setup  ## smoothness of the page's map at 100,000 cells, and how long UMAP takes (3 minutes)
	PYTHONPATH=tests:tests/bench $(BIN)/python tests/bench/bench_page.py $(BENCH)

bench-train: setup  ## speed of the training loop against the barest loop and Hugging Face's Trainer (half an hour)
	PYTHONPATH=tests/bench $(BIN)/python tests/bench/bench_train.py $(BENCH)

bench-serve: setup  ## cells a second and latency of a server against the bare model and @serve.batch (10 minutes)
	PYTHONPATH=tests:tests/bench $(BIN)/python tests/bench/bench_serve.py $(BENCH)

bench-size: setup  ## what infra/size.py says against two sizes that are measured here (15 minutes, 5 GB in build/)
	PYTHONPATH=tests:tests/bench $(BIN)/python tests/bench/bench_size.py $(BENCH)

bench-scale: setup  ## a million cells the whole way: seconds, memory and disk of each command, and their page (25 minutes, 35 GB in build/)
	PYTHONPATH=tests/bench $(BIN)/python tests/bench/bench_scale.py $(BENCH)

bench-commits: setup  ## what a commit costs, and opening the lake, up to 1,000 datasets; requests on S3 (15 minutes)
	PYTHONPATH=tests:tests/bench $(BIN)/python tests/bench/bench_commits.py $(BENCH)

image-proof: setup  ## run the image's steps in a clean root, and the image in it, without Docker (root, debootstrap; 10 minutes)
	$(BIN)/python infra/image/prove.py $(PROOF)

test-quick: setup  ## run the tests that need no cluster (a quarter of an hour)
	$(BIN)/python -m pytest -m "not ray and not s3 and not road"

check: setup  ## lint, format, types, dependency contracts, manifests, image, dashboards, pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python infra/kubernetes/check.py
	$(BIN)/python infra/image/dockerfile.py
	$(BIN)/python infra/monitoring/check.py
	$(BIN)/python -m pytest -q tests/test_layout.py

format: setup  ## write the code the way ruff wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:  ## resolve the newest allowed versions into requirements.lock
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -qq torch==2.13.0 ".[dev]"
	build/lock/bin/python -m pip freeze --exclude somaflow --all | grep -vE '^(pip|setuptools|wheel)==' | sed -E 's/\+cpu$$//' > requirements.lock
	rm -rf build/lock

clean:  ## remove the environment, build/ and demo/; lake/, where the demo's cells are, stays
	rm -rf $(VENV) demo build
