PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test quick versions lint wheel zoo cost gates growth random soak fuzz heavy integrations docs clean \
	experiments experiments-small experiments-full experiments-gpu

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/plasticnet demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# What takes more than a few seconds is left out.
quick: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow"

# The quick tests on the oldest and the newest torch, by Python 3.11 to 3.13, as far as these are at hand; it says what it
# skips. VERSIONS=--dry-run only says what it would do.
versions:
	$(PYTHON) release/versions.py $(VERSIONS)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --project pyproject.toml

# The wheel in dist, tried in an empty environment, into which it brings what it asks for: some minutes, and gigabytes.
wheel: $(VENV)/.installed
	$(BIN)/python release/wheel.py

$(VENV)/.zoo: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test,zoo]"
	touch $@

zoo: $(VENV)/.zoo
	$(BIN)/python benchmarks/zoo.py $(ZOO); code=$$?; $(BIN)/python benchmarks/zoo_open.py && \
		$(BIN)/python benchmarks/zoo_table.py && exit $$code

cost: $(VENV)/.installed
	$(BIN)/python benchmarks/cost.py $(COST)
	$(BIN)/python benchmarks/cost_table.py

# DATA=DIR, the folder that holds MNIST/raw; some hours, and it goes on from what is there.
gates: $(VENV)/.installed
	$(BIN)/python benchmarks/variance.py --data-dir $(DATA)
	$(BIN)/python experiments/interpolation.py
	$(BIN)/python experiments/budgets.py
	$(BIN)/python experiments/half_precision.py
	$(BIN)/python experiments/ablation.py --data-dir $(DATA)
	$(BIN)/python experiments/lenet_targets.py --data-dir $(DATA)
	$(BIN)/python experiments/few_pixels.py --data-dir $(DATA)
	$(BIN)/python experiments/gates_table.py

# Growth, and what it is compared with: some hours. What another rule has grown is measured anew; all else stays.
growth: $(VENV)/.installed
	$(BIN)/python experiments/growth_stalls.py
	$(BIN)/python experiments/growth_depth.py
	$(BIN)/python experiments/growth_peers.py --data-dir $(DATA)
	$(BIN)/python experiments/growth_budget.py --data-dir $(DATA)
	$(BIN)/python experiments/growth_lifelong.py --data-dir $(DATA)
	for task in digits housing adult MNIST Fashion-MNIST; do \
		$(BIN)/python experiments/growth_price.py --task $$task --data-dir $(DATA) || exit 1; done
	$(BIN)/python experiments/growth_few.py --data-dir $(DATA)
	$(BIN)/python experiments/growth_table.py

# Random networks: exact, or frozen with a reason. RANDOM="--resume" goes on from what is there, and "--again" runs what
# has failed once more.
random: $(VENV)/.installed
	$(BIN)/python benchmarks/random_networks.py --count 2000 --workers 2 $(RANDOM); code=$$?; \
		$(BIN)/python benchmarks/random_table.py && exit $$code

# Trainings that are killed, files that are damaged, networks that change their size, and a long training; it goes on from
# what is there: KILLS=1000 RANKS=100 FILES=1000000 NETWORKS=10000 for more, LONG="--steps 2400 --resizes 50" for less.
KILLS := 100
RANKS := 30
FILES := 50000
NETWORKS := 1000
soak: $(VENV)/.installed
	$(BIN)/python benchmarks/soak_kills.py --count $(KILLS); code=$$?; \
		$(BIN)/python benchmarks/soak_ranks.py --count $(RANKS) || code=1; \
		$(BIN)/python benchmarks/soak_files.py --count $(FILES) || code=1; \
		$(BIN)/python benchmarks/soak_networks.py --count $(NETWORKS) || code=1; \
		$(BIN)/python benchmarks/soak_denormals.py || code=1; \
		$(BIN)/python benchmarks/soak_long.py $(LONG) || code=1; \
		$(BIN)/python benchmarks/soak_table.py && exit $$code

$(VENV)/.fuzz: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test,fuzz]"
	touch $@

# Files that a fuzzer makes, which sees what each of them reaches: FUZZ="--count 100000" for so many of each kind.
fuzz: $(VENV)/.fuzz
	$(BIN)/python benchmarks/soak_coverage.py $(FUZZ); code=$$?; $(BIN)/python benchmarks/soak_table.py && exit $$code

$(VENV)/.peers: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test,peers]"
	touch $@

# The evidence; DATA=DIR is the folder with the data, and it goes on from what is there. On two cores, `make -j2
# experiments DATA=DIR` takes about three hours; it needs no CIFAR. Those that take longest come first.
TASKS := Shakespeare SST-2 Fashion-MNIST MNIST housing Adult
experiments: $(TASKS:%=experiments-%) experiments-small
	for table in peers_table gates_table tables; do $(BIN)/python experiments/$$table.py || exit 1; done

.PHONY: $(TASKS:%=experiments-%)
$(TASKS:%=experiments-%): experiments-%: $(VENV)/.peers
	$(BIN)/python experiments/peers.py --data-dir $(DATA) --tasks $*

experiments-small: $(VENV)/.peers
	$(BIN)/python experiments/moons.py
	$(BIN)/python experiments/interpolation.py
	$(BIN)/python experiments/few_units.py
	$(BIN)/python experiments/first_layer.py --data-dir $(DATA)
	$(BIN)/python experiments/width_search.py --data-dir $(DATA)

# All peers on two tasks, MNIST to the end, growth, and CIFAR-10: days on two cores. CACHE=DIR keeps what is trained.
experiments-full: experiments
	$(BIN)/python experiments/peers.py --data-dir $(DATA) --tasks ETTh1
	$(BIN)/python experiments/peers.py --data-dir $(DATA) --tasks housing Adult --budgets 1 2 --all
	$(BIN)/python experiments/peers.py --data-dir $(DATA) --tasks housing Adult Shakespeare \
		--ways "plasticnet, from random weights"
	$(BIN)/python experiments/peers_attempts.py --data-dir $(DATA)
	$(MAKE) growth gates DATA=$(DATA)
	$(BIN)/python experiments/cifar_cut.py --data-dir $(DATA) --cache $(CACHE)
	for share in 0.4 0.73; do $(BIN)/python experiments/cifar_gates.py --data-dir $(DATA) --cache $(CACHE) \
		--share $$share --ways dense gates shrink Torch-Pruning || exit 1; done
	$(BIN)/python experiments/cifar_gates.py --data-dir $(DATA) --cache $(CACHE) --depth 56 --share 0.476 --epochs 4
	$(BIN)/python experiments/cifar_scratch.py --data-dir $(DATA) --cache $(CACHE)
	for table in peers_table shrinking_table; do $(BIN)/python experiments/$$table.py || exit 1; done

# The paper's ResNet-56 and WRN-28-10, on torchvision's CIFAR in DATA: days on a GPU.
experiments-gpu: $(VENV)/.installed
	for data in cifar10 cifar100; do for network in resnet56 wrn-28-10; do for mode in prune grow; do \
		$(BIN)/python experiments/paper_cifar.py --data-dir $(DATA) --kept $(CACHE)/$$data-$$network-$$mode.safetensors \
			--data $$data --network $$network --mode $$mode || exit 1; done; done; done

# What `make test` leaves out or samples: all detectors of torchvision, calls that are interrupted at 150 of their lines
# each, and the examples that take long. Some ten minutes.
heavy: $(VENV)/.installed
	PLASTICNET_HEAVY=1 $(BIN)/python -m pytest tests/whole/test_detectors.py tests/whole/test_interrupts.py \
		tests/whole/test_readme.py tests/oneshot/test_prune.py

$(VENV)/.integrations: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test,integrations]"
	touch $@

# Lightning, the Trainer and Accelerate, in one and in two processes: some ten minutes; INTEGRATIONS="-k lightning" runs
# some of it, and leaves the other rows as they are.
integrations: $(VENV)/.integrations
	$(BIN)/python experiments/integrations.py $(INTEGRATIONS); code=$$?; \
		$(BIN)/python experiments/integrations_table.py && exit $$code

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

# The pages of docs/ as a site, in build/site; a link that leads nowhere is an error.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs build
