# make demo | hfo2 | gst | figures | docs | test | fuzz | bench | bench-gpu | setup | lint | clean
PYTHON ?= python3
# nproc counts no more cores than OMP_NUM_THREADS says
CORES ?= $(shell env -u OMP_NUM_THREADS nproc)
RUN := . .venv/bin/activate &&
SNAKEMAKE := $(RUN) snakemake --cores $(CORES) --show-failed-logs --rerun-incomplete --quiet rules reason host

# Material's notice about the future of MkDocs is no warning of this site
MKDOCS := NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict

.PHONY: demo hfo2 gst figures docs test fuzz bench bench-gpu setup lint clean

demo: setup
	$(SNAKEMAKE) --configfile config/demo.yaml
	@test results/report.html -nt results/summary.csv || { $(RUN) snakemake --configfile config/demo.yaml --report results/report.html --quiet all; }
	@$(RUN) hamscale table results/summary.csv
	@echo "report: results/report.html    page: results/index.html    pictures: results/figures/"

# accuracy on real DFT, from nothing: hours, most of them CP2K's
hfo2 gst: setup .venv/md
	$(SNAKEMAKE) --configfile config/$@.yaml
	$(RUN) for name in $(MATERIALS_$@); do hamscale evaluate results/$$name/models/$$name --split test || exit 1; done
MATERIALS_hfo2 := hfo2_amorphous hfo2
MATERIALS_gst := gst124_amorphous gst124

# from the tables of resources/raw: needs neither CP2K nor a GPU
figures: .venv/installed
	$(SNAKEMAKE) -- figures
	@echo "pictures: results/figures/*.pdf, .png"

# the site, in site/: it opens in a browser without a server
docs: .venv/docs
	$(RUN) $(MKDOCS)
	@echo "site: site/index.html"

# all tests, on all cores; a program that is missing is installed, or the run ends before it begins
test: setup .venv/docs
	@tests/setup_programs.sh
	$(RUN) pytest --all-programs -n $(CORES)

# mutants of every kind of file, 10,000 of each: about an hour; another seed, others. Every verb killed at each of its writes, and out
# of disk at 20 points
MUTANTS ?= 10000
SEED ?= 0
fuzz: setup
	$(RUN) python tests/fuzz/readers.py --count $(MUTANTS) --seed $(SEED)
	$(RUN) FUZZ=$(MUTANTS) HAMSCALE_FAULTS=all pytest tests/fuzz/test_own_files.py tests/test_faults.py -n $(CORES)

bench: setup
	$(RUN) python benchmarks/standard.py

# the network, figure 3, and scaling over the GPUs of this machine (GPUS of them): results/benchmarks, results/raw
DEVICE ?= cuda
GPUS ?= 1
bench-gpu: .venv/installed
	$(RUN) python benchmarks/standard.py --device $(DEVICE)
	$(RUN) python benchmarks/throughput.py --device $(DEVICE) --raw results/raw
	$(RUN) python benchmarks/scaling.py measure --device $(DEVICE) --ranks $(GPUS) --raw results/raw

lint: .venv/installed .venv/docs
	$(RUN) ruff check . && ruff format --check . && snakefmt --check Snakefile workflow && lint-imports && mypy && snakemake --lint && $(MKDOCS)

setup: .venv/installed
	@workflow/setup_cp2k.sh

.venv/installed: envs/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "python >= 3.11 is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r envs/cpu.lock
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# melt and quench of amorphous cells
.venv/md: .venv/installed envs/md.lock
	@.venv/bin/python -c 'import sys; sys.exit(0 if sys.version_info < (3, 13) else "CHGNet, which makes amorphous cells, has no wheel for python 3.13 yet: rm -r .venv, then make PYTHON=python3.12 ...")'
	.venv/bin/pip install --quiet --disable-pip-version-check -r envs/md.lock
	@touch $@

# the site: MkDocs and its theme
.venv/docs: .venv/installed envs/docs.lock
	.venv/bin/pip install --quiet --disable-pip-version-check -r envs/docs.lock
	@touch $@

clean:
	rm -rf results logs site .snakemake
