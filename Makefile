# make demo: quantise and sample the bundled digits model.  make test: run the tests.
# make lint: how the code reads.  make test-slow: the extras of a minute and more.  All set up .venv first.
PYTHON ?= python3
READY := .venv/.ready

.PHONY: demo test test-slow lint
demo: $(READY)
	.venv/bin/python compare.py --model DiT-Digits-Outliers --recipes rtn smoothquant ditas-published ditas \
	    --num-fid-samples 64 --num-fidelity-samples 32 --per-proc-batch-size 32 \
	    --output results/demo --report results/demo/report

test: $(READY)
	.venv/bin/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	.venv/bin/python -m pytest -m slow

lint: $(READY)
	.venv/bin/ruff check .

$(READY): requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@
