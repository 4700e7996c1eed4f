# make demo: quantise and sample the bundled digits model.  make test: run every test.  Both set up .venv first.
PYTHON ?= python3
READY := .venv/.ready

.PHONY: demo test
demo: $(READY)
	.venv/bin/python compare.py --model DiT-Digits-Outliers --recipes rtn smoothquant ditas-published ditas \
	    --num-fid-samples 100 --num-fidelity-samples 100 --output results/demo --report results/demo/report

test: $(READY)
	.venv/bin/python -m pytest

$(READY): requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@
