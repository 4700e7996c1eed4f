# make demo: quantise and sample the bundled digits model.  make test: run every test.  Both set up .venv first.
PYTHON ?= python3
READY := .venv/.ready

.PHONY: demo test
demo: $(READY)
	.venv/bin/python -m examples.digits.demo

test: $(READY)
	.venv/bin/python -m pytest

$(READY): requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@
