# make demo: quantise and sample the bundled emoji model.  make test: run the tests.
# make lint: how the code reads.  make test-processors: the numerical tests as other processors
# would see them (-crossed: with other numbers of threads).  make test-slow: the extras of a minute
# and more.  All set up .venv first.
PYTHON ?= python3
READY := .venv/.ready
PYTEST := .venv/bin/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-processors test-processors-crossed test-slow lint
demo: $(READY)
	.venv/bin/python compare.py --model DiT-Emoji-Outliers --cfg-scale 4 --num-sampling-steps 25 \
	    --recipes rtn smoothquant ditas-published ditas ditas-plus \
	    --num-fid-samples 64 --num-fidelity-samples 32 --per-proc-batch-size 32 \
	    --output results/demo --report results/demo/report

test: $(READY)
	$(PYTEST)

# Tests of processes, files and pictures, and the longest ones, are left to make test.
OTHER := adapters checkpoint cli compare compare_pipelines diffusers_use diffusers_versions \
    digits discover ditas download efficientnet emoji emoji_runs end_to_end evaluate explored \
    export flags hand_over hand_over_ranges hub images inspect older_formats pipeline_sampling pipelines pixart \
    quality report sampling survival temporal threads triton undo wheel whole_pipelines
NUMERICAL := $(filter-out $(OTHER:%=tests/test_%.py),$(wildcard tests/test_*.py)) -k "not come_nearer and not offloading"

# The instruction set of PyTorch's own operators (ATEN), or of its products (oneDNN), and threads.
# Two threads in each of several processes wait for each other passively: spinning, they crawl.
define as-processor
	@echo "== $(1), threads: $(2)"
	@$(1) OMP_NUM_THREADS=$(2) OMP_WAIT_POLICY=passive $(PYTEST) $(NUMERICAL)
endef

# Every instruction set, each with one number of threads; the other number is an extra.
test-processors: $(READY)
	$(call as-processor,ATEN_CPU_CAPABILITY=default,1)
	$(call as-processor,ATEN_CPU_CAPABILITY=avx2,2)
	$(call as-processor,ONEDNN_MAX_CPU_ISA=AVX2,2)
	$(call as-processor,ONEDNN_MAX_CPU_ISA=AVX512_CORE,1)

test-processors-crossed: $(READY)
	$(call as-processor,ATEN_CPU_CAPABILITY=default,2)
	$(call as-processor,ATEN_CPU_CAPABILITY=avx2,1)
	$(call as-processor,ONEDNN_MAX_CPU_ISA=AVX2,1)
	$(call as-processor,ONEDNN_MAX_CPU_ISA=AVX512_CORE,2)

test-slow: $(READY)
	.venv/bin/python -m pytest -m slow

lint: $(READY)
	.venv/bin/ruff check .

$(READY): requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@
