# make demo    trains a small GQE language model on the text of Python's own standard library, evaluates it, samples from it
# make test    runs the whole test suite, but for what needs seqio: make test-seqio runs that, in .venv-seqio
# All set up .venv first, with the versions that constraints.txt names. STEPS=3600 makes the demo longer (about an hour).
# PYTHON=python3.12 does the same in .venv-3.12: from 3.12 on with the newer versions of constraints-newest.txt.

PYTHON ?= python3
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
RUN ?= runs/demo
STEPS ?= 300
PYTEST_ARGS ?=

BIN := $(VENV)/bin
CONSTRAINTS := $$($(BIN)/python -c 'import sys; print("constraints-newest.txt" if sys.version_info >= (3, 12) else "constraints.txt")')
INSTALL := PIP_CONSTRAINT=$(CURDIR)/$(CONSTRAINTS) $(BIN)/pip install --quiet --disable-pip-version-check
# One process for each core, each with whole files: compiling, the most of it, takes one core.
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile

# The exported model's own tests, and those of what an import reads, under the oldest and the newest transformers that the
# extra `pytorch` allows, which stand in folders of their own before the environment's. Left out: gradients against JAX.
TRANSFORMERS := $(VENV)-transformers
TRANSFORMERS_TESTS := tests/test_pytorch_model_generate.py tests/test_pytorch_model_train.py tests/test_pytorch_model_folder.py \
    tests/test_import_differential.py

# The layer against the spec, kernels, training, checkpoints, generation, flax's bridges.
NEWEST_TESTS := tests/test_attention_spec.py tests/test_kernels_attend.py tests/test_kernels_tpu_forward.py \
    tests/test_linen_bridge.py tests/test_step.py tests/test_train_loop.py tests/test_checkpoint.py tests/test_generate.py

.PHONY: demo docs test test-fast test-newest test-seqio .test-seqio test-transformers lint clean

demo: $(VENV)/.core
	$(BIN)/gqe train --config smoke:steps=$(STEPS) --run $(RUN)
	$(BIN)/gqe eval --run $(RUN)
	$(BIN)/gqe generate --run $(RUN) --prompt 'def main(' --max-new-tokens 300
	@echo
	@echo 'The checkpoint is in $(RUN)/checkpoints. What to type next:'
	@echo '  make demo STEPS=3600                                      train on, about an hour (now: $(STEPS) steps)'
	@echo "  $(BIN)/gqe generate --run $(RUN) --prompt 'import '"
	@echo '  $(BIN)/gqe inspect run --run $(RUN)                       loss curve and load of each expert'
	@echo "  $(BIN)/gqe prepare --data 'path/**/*.txt' --out data/mine --seq-len 512"
	@echo '  $(BIN)/gqe train --config smoke --config.data.path=data/mine --run runs/mine'

test: $(VENV)/.dev
	$(PYTEST) $(PYTEST_ARGS)

# The quick part, without PyTorch.
test-fast: $(VENV)/.test
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

# What depends most on the versions of JAX, flax and libtpu, for a second Python: a few minutes.
test-newest: $(VENV)/.test
	$(PYTEST) $(NEWEST_TESTS) -m 'not slow' $(PYTEST_ARGS)

# seqio brings TensorFlow, 2.4 GB.
test-seqio:
	$(MAKE) VENV=$(VENV)-seqio .test-seqio
.test-seqio: $(VENV)/.seqio
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest tests/test_seqio.py

test-transformers: $(VENV)/.dev $(TRANSFORMERS)/oldest $(TRANSFORMERS)/newest
	for version in oldest newest; do \
	    PYTHONPATH=$(TRANSFORMERS)/$$version JAX_PLATFORMS=cpu $(BIN)/python -m pytest $(TRANSFORMERS_TESTS) \
	        -m 'not slow' -k 'not loss_and_gradients and not k2' $(PYTEST_ARGS) || exit; \
	done

# The pages of docs/ and the public docstrings as a site; fails on a broken link.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir $(VENV)/site
	@echo 'Open $(VENV)/site/index.html, or serve it: $(BIN)/mkdocs serve'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) $(VENV)-seqio $(TRANSFORMERS)

$(TRANSFORMERS)/oldest: | $(BIN)/pip
	$(BIN)/pip install --quiet --disable-pip-version-check --target $@ 'transformers==4.57.*'
	$(BIN)/pip install --quiet --disable-pip-version-check --target $@ --no-deps 'datasets==4.1.*'  # Trainer imports it
$(TRANSFORMERS)/newest: pyproject.toml | $(BIN)/pip
	rm -rf $@
	$(BIN)/pip install --quiet --disable-pip-version-check --target $@ 'transformers>=5.24'

# What each environment has beyond the core is an extra of pyproject.toml.
$(VENV)/.core: pyproject.toml constraints.txt constraints-newest.txt | $(BIN)/pip
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt constraints-newest.txt | $(BIN)/pip
	$(INSTALL) --editable '.[test]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt constraints-newest.txt | $(BIN)/pip
	$(INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt constraints-newest.txt | $(BIN)/pip
	$(INSTALL) --editable '.[docs]'
	@touch $@

$(VENV)/.seqio: pyproject.toml constraints.txt constraints-newest.txt | $(BIN)/pip
	$(INSTALL) --editable '.[seqio]' pytest
	@touch $@

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gqe_jax needs Python 3.11 or newer; name one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
