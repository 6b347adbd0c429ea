# Everything a fresh clone needs. `make` lists the targets; each one that needs the environment sets it up first.
VENV ?= .venv
SHELL := /bin/sh
BIN := $(abspath $(VENV))/bin
PY := $(BIN)/python
# An environment of its own: no packages of the user's, no compiled files of another checkout
export PYTHONNOUSERSITE := 1
export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu test-ecosystem test-faults test-soak check format data train eval tables benchmark benchmark-peers benchmark-first-gpu study study-status study-stop clean

help:  ## this list
	@echo "mohd_train: pretraining MoHD (Mixture of Hidden Dimensions) transformers on MosaicML Composer"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1~\2/p' Makefile | awk -F'~' '{printf "%-16s %s\n", $$1, $$2}'
	@echo
	@echo "  VENV=$(VENV) names the environment; every target but help and clean sets it up first."

# The script compares contents (not dates) with a stamp that is written last, and locks: cheap when there is nothing to do.
setup:  ## create .venv (or VENV=) and install everything: about 5 minutes, 7 GB; nothing to do the second time
	@python=$$(sh scripts/find_python.sh "$(PYTHON)" "$(PY)") && "$$python" scripts/setup_env.py "$(VENV)"

demo: setup  ## raw text -> shards -> three models -> ten tasks -> table and figure, in runs/demo [RAW= TOKENIZER= EVAL_DATA= OUT=]
	@$(PY) scripts/demo.py run --out "$(or $(OUT),runs/demo)" $(if $(RAW),--raw "$(RAW)") $(if $(TOKENIZER),--tokenizer "$(TOKENIZER)") \
	    $(if $(EVAL_DATA),--eval-data "$(EVAL_DATA)") $(ARGS)

test: setup  ## every test: 11 to 15 minutes on two cores
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal $(ARGS)

test-gpu: setup  ## the kernels on this machine's GPU against the float64 reference (about two minutes)
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/kernels/test_on_gpu.py -n 4 $(ARGS)

# A folder of their own: what the project needs stays as it is, and make test is the same with and without them
test-ecosystem: setup  ## PEFT, TRL, bitsandbytes, quantized caches on MoHD models (installs them into .ecosystem; about two minutes)
	$(PY) -m pip install --quiet --no-deps --upgrade --target .ecosystem peft trl bitsandbytes hqq
	PYTHONPATH="$(CURDIR)/.ecosystem" OMP_NUM_THREADS=1 $(PY) -m pytest tests/hf $(ARGS)

test-faults: setup  ## every fault that is injected: what happened, steps lost (measured), recovered; and the demo from a wheel (about 5 minutes)
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/faults tests/train tests/data tests/sweep tests/demo tests/utils tests/test_package.py -m "fault or expensive" $(ARGS)

test-soak: setup  ## a run of 2,000 batches killed at random 60 times, ending as an untouched one (over half an hour) [KILLS=60]
	OMP_NUM_THREADS=1 KILLS=$(or $(KILLS),60) $(PY) -m pytest tests/faults/test_soak.py -m expensive -s $(ARGS)

check: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

need-%:
	@test -n "$($*)" || { echo "error: make $(MAKECMDGOALS) needs $*=...; see make help" >&2; exit 2; }

data: need-RAW need-TOKENIZER setup  ## prepare shards from RedPajama: RAW= TOKENIZER= [OUT=data/redpajama SEQ_LEN=4096 VAL_TOKENS=2000000 ARGS=]
	$(PY) data_prep/prepare.py --raw "$(RAW)" --tokenizer "$(TOKENIZER)" --out "$(or $(OUT),data/redpajama)" \
	    --seq-len $(or $(SEQ_LEN),4096) --val-tokens $(or $(VAL_TOKENS),2000000) $(ARGS)

train: setup  ## train one model: [RECIPE=paper_50b MODEL=355m MOHD=x2 GPUS=8 ARGS="data.local=... max_duration=..."]
	$(BIN)/composer $(if $(GPUS),-n $(GPUS)) scripts/train.py configs/recipe/$(or $(RECIPE),paper_50b).yaml \
	    configs/model/$(or $(MODEL),355m).yaml configs/mohd/$(or $(MOHD),x2).yaml $(ARGS)

eval: need-CHECKPOINT setup  ## the ten tasks on a checkpoint or Hugging Face folder: CHECKPOINT= [EVAL_DATA= ARGS=]
	$(PY) eval/run_eval.py --checkpoint "$(CHECKPOINT)" $(if $(EVAL_DATA),--data-dir "$(EVAL_DATA)") $(ARGS)

tables: setup  ## Table 2 from results beside the paper's: [RESULTS="folder ..." ARGS="--format latex"]
	$(PY) eval/make_tables.py $(or $(RESULTS),eval/results) $(ARGS)

benchmark: setup  ## time MoHD against LLaMA on this machine's GPU, or CPU (6 minutes), into benchmarks/ [OUT= ARGS=]
	$(PY) scripts/benchmark.py --record "$(or $(OUT),benchmarks)" $(ARGS)

benchmark-peers: setup  ## the same beside transformers' and litgpt's models (about ten minutes on one core; installs litgpt into .peers); and with DATA=, RAW= TOKENIZER= a run, its start and preparation [OUT=benchmarks ARGS=]
	$(PY) -m pip install --quiet --no-deps --upgrade --target .peers litgpt lightning pytorch-lightning lightning-utilities jsonargparse
	PYTHONPATH="$(CURDIR)/.peers" $(PY) scripts/benchmark.py --record "$(or $(OUT),benchmarks)" --peers $(if $(DATA),--data "$(DATA)") $(if $(RAW),--raw "$(RAW)") \
	    $(if $(TOKENIZER),--tokenizer "$(TOKENIZER)") $(ARGS)

benchmark-first-gpu: setup  ## on a GPU for the first time: all that is worth measuring, in order of worth [MINUTES=25 DATA= OUT=benchmarks ARGS=]
	$(PY) scripts/benchmark.py --first-gpu "$(or $(OUT),benchmarks)" --minutes $(or $(MINUTES),25) $(if $(DATA),--data "$(DATA)") $(ARGS)

# One launcher at a time holds the lock; what it starts survives the terminal, at low priority. A second `make study` after it
# ended, was stopped or was killed goes on with what is not finished.
STUDY_SCALE := $(or $(SCALE),small)
STUDY_OUT := $(or $(OUT),runs/sweep/$(or $(SWEEP),study)-$(STUDY_SCALE))
study: need-DATA setup  ## train the study in the background, resuming: DATA= [SCALE=small PARALLEL=2 SWEEP=study OUT= ARGS=]
	@mkdir -p "$(STUDY_OUT)"; flock -n "$(STUDY_OUT)/launcher.lock" true || { echo "under way: make study-status"; exit 0; }; \
	OMP_NUM_THREADS=$(or $(OMP_NUM_THREADS),1) setsid nohup nice -n 10 sh scripts/study.sh "$(PY)" "configs/sweep/$(or $(SWEEP),study).yaml" \
	    "$(STUDY_SCALE)" "$(STUDY_OUT)" --data "$(DATA)" --parallel $(or $(PARALLEL),2) $(ARGS) </dev/null >>"$(STUDY_OUT)/launcher.log" 2>&1 & \
	echo "started, see $(STUDY_OUT)/launcher.log; make study-status shows what it has shown so far, make study-stop stops it"

study-status: setup  ## what the study has done, and what it has shown so far: [SCALE=small SWEEP=study OUT=]
	@$(PY) scripts/sweep.py status "$(STUDY_OUT)" --once || true # 1: some run failed, which the table says
	@$(PY) scripts/study.py status "$(STUDY_OUT)"

study-stop:  ## stop the study: its runs save and end, `make study` goes on: [SCALE=small SWEEP=study OUT=]
	@test -f "$(STUDY_OUT)/launcher.pid" && ! flock -n "$(STUDY_OUT)/launcher.lock" true || { echo "not under way"; exit 1; }
	@kill -TERM $$(cat "$(STUDY_OUT)/launcher.pid") && echo "stopping; its runs save first (about a minute at most)"

clean:  ## remove caches (never data, runs or the environment)
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
	find . -name __pycache__ -not -path './.venv/*' -type d -prune -exec rm -rf {} +
