# Two commands on a fresh machine with only python3 (>= 3.10) and make:
#   make demo    a video from the pack's own tiny model, on the CPU:  output/demo.mp4, output/demo.png
#   make test    lint, types and the test suite
# and when what must never be lost is touched:
#   make slow    tests of kills, broken packages and what else takes long
#   make faults  kills, full disks, full cards, interrupts, two at once: an hour or more of one core
PYTHON ?= python3
BIN := .venv/bin
# containers' images often set it: each of the suite's many processes would compile all sources anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint style types check slow faults format clean

demo: .venv/ready
	$(BIN)/lowvram-video demo --output output/demo.mp4

# types beside the tests, whose workers wait for files and processes now and then
test: style
	$(MAKE) -j 2 types check

lint: style types

style: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	# mypy wants the package under its import name; the checkout's folder may have any
	rm -rf .mypy_cache/tree && mkdir -p .mypy_cache/tree && ln -s ../.. .mypy_cache/tree/lowvram_video
	cd .mypy_cache/tree && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p lowvram_video

# one thread for each worker: tiny models gain nothing from more, and runs stay repeatable; three, as on two cores
# a third of the time was spent waiting
check: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --durations=30 -m "not slow and not comfyui"

slow: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=30 -m "slow and not comfyui"

faults: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --out benchmarks/results/faults_cpu_$$(date +%F).json

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv output build *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/ready: requirements.txt requirements-dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	# of the 230 MB of sources few are ever imported: those are compiled then
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -r requirements-dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@
