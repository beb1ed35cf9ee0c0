# What people and CI run. `make demo` and `make test` set everything up themselves, in .venv.
#
#   make demo                     the main job: federate, prune, tune, export, run in llama.cpp
#   make test                     every test, C++ ones under the sanitizers included
#   make test-export              SmolLM2-135M pruned four ways in every runtime, and what is refused: minutes
#   make test-profile             profiles and tuning steps of real and tiny models, sensors of six boards: minutes
#   make test-arm                 the kernels on AArch64, cross compiled and emulated; as root it installs what it needs
#   make test-faults              every process killed, every file cut short, full disks, wrong clocks, nonsense sent: minutes
#   make test-fuzz-nightly        the same nonsense, fifty times as much: half an hour
#   make test-engines             the same rounds in process, over HTTPS, over Flower and on Ray: one adapter, four costs
#   make test-page                the fleet page in a browser with a fleet of real agents; as root it installs what it needs
#   make image                    an image of the agent for any UEFI AArch64 machine, into dist/images; VARIANT=full with the worker
#   make test-images              the same started in an emulated machine: enrols, runs a pruned model, updates itself, powers off
#   make test-images-nightly      dead slots, power cuts, a second build to compare, a round in the full image: hours
#   make reproduce-nightly        every method once on one task: up to 25 minutes
#   make wheels                   wheels for x86-64 and AArch64, glibc 2.17 or newer, into dist/; AArch64's tried in qemu
#   make lint                     formatting, linting, types, C++ warnings
#   make bench                    benchmarks, into benchmarks/results/
#
# Settings: PYTHON=python3.12   the interpreter to build .venv with
#           TORCH_INDEX=URL     the package index to take torch from (PyTorch's own has the small CPU build)
#           WHEELS=DIR          where the compiled llama.cpp wheel is kept between clones

PYTHON ?= python3
VARIANT ?= agent
TORCH_INDEX ?=
WHEELS ?= $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/fedspine-edge/wheels
VENV := .venv
ENGINES := .venv-engines
WHEEL_TOOLS := .venv-wheels
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
LOCKED := install --no-deps --require-hashes
LLAMA := $(shell sed -n 's/^llama-cpp-python==\([0-9.]*\).*/\1/p' requirements/llama.txt)
# Without AMX: llama.cpp's tile configuration on the stack is optimised away by gcc, and its AMX kernels then crash.
NO_AMX := $(if $(filter x86_64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
LLAMA_BUILT := $(WHEELS)/.llama-$(LLAMA)-no-amx
NATIVE_SOURCES := $(wildcard csrc/*.cc csrc/*.h) CMakeLists.txt pyproject.toml
RUN := OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-export test-profile test-arm test-faults test-fuzz-nightly test-engines .test-flower .test-ray test-page test-page-nightly test-images test-images-nightly reproduce-nightly lint image wheels bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(RUN) $(BIN)/fedspine simulate quickstart

test: $(VENV)/.installed $(VENV)/.dev
	$(RUN) $(BIN)/python -m pytest
	$(RUN) sh tests/csrc/run.sh

test-export: $(VENV)/.installed $(VENV)/.dev
	$(RUN) $(BIN)/python -m pytest -rfEP -m matrix tests/edge/test_export_real.py
	$(RUN) $(BIN)/python -m pytest tests/edge/test_model_commands.py tests/edge/test_export_gguf.py \
	  tests/edge/test_export_matrix.py tests/edge/test_export_adapter.py tests/edge/test_other_llama_cpp.py

test-profile: $(VENV)/.installed $(VENV)/.dev
	$(RUN) $(BIN)/python -m pytest -rfEP -m matrix tests/edge/test_profile_real.py
	$(RUN) $(BIN)/python -m pytest tests/edge/test_profile.py tests/edge/test_profile_train.py tests/edge/test_sensors.py \
	  tests/edge/test_latency.py tests/edge/test_doctor.py tests/server/test_step_law.py

test-arm: $(VENV)/.dev
	sh tests/arm/run.sh

# What a device may lie about and what a stranger may try needs no fleet: all but the first line.
test-faults: $(VENV)/.installed $(VENV)/.dev
	$(RUN) $(BIN)/python -m pytest -rfEP --durations=12 -m faults tests/edge
	$(RUN) $(BIN)/python -m pytest tests/server/test_link_rounds.py tests/server/test_link_damage.py
	$(RUN) $(BIN)/python -m pytest tests/server/test_link_security.py tests/edge/test_agent.py
	$(RUN) $(BIN)/python -m pytest -rfEP -m faults tests/server/test_link_fuzz.py
	sh tests/server/install_postgres.sh
	$(RUN) $(BIN)/python -m pytest -m faults tests/server/test_link_postgres.py

# 100,000 requests, as many frames and 5,000 rounds of a device that sends nonsense: half an hour.
test-fuzz-nightly: $(VENV)/.installed $(VENV)/.dev
	FEDSPINE_FUZZ=100000 $(RUN) $(BIN)/python -m pytest -rfEP -m faults --durations=12 tests/server/test_link_fuzz.py

# The carriers' costs are compared first, alone; the rest waits more than it works, so two at once.
test-engines: $(VENV)/.installed $(VENV)/.dev $(ENGINES)/.installed
	$(RUN) $(BIN)/python -m pytest -rfEP --durations=12 tests/edge/test_engines.py
	$(MAKE) --jobs=2 --output-sync .test-flower .test-ray

.test-flower:
	$(RUN) $(BIN)/python -m pytest --durations=12 tests/edge/test_flower.py tests/edge/test_flower_commands.py tests/server/test_carried.py

.test-ray:
	$(RUN) $(BIN)/python -m pytest --durations=12 -m ray tests/edge/test_ray.py tests/edge/test_reproduce.py

test-page: $(VENV)/.installed $(VENV)/.dev $(VENV)/.browser
	$(RUN) $(BIN)/python -m pytest -rfEP --durations=12 -m page tests/edge/test_fleet_page.py
	$(RUN) $(BIN)/python -m pytest tests/server/test_page.py tests/server/test_page_sessions.py

test-page-nightly: $(VENV)/.installed $(VENV)/.dev $(VENV)/.browser
	FEDSPINE_PAGE_SECONDS=600 $(RUN) $(BIN)/python -m pytest -rfEP -m page -k smooth tests/edge/test_fleet_page.py

image: $(VENV)/.installed $(VENV)/.dev
	sh device_images/tools.sh
	$(BIN)/fedspine image build --variant $(VARIANT)

test-images: image
	$(RUN) $(BIN)/python -m pytest -rfEP --durations=12 -m images tests/images

test-images-nightly: image
	$(BIN)/fedspine image build --variant full
	$(RUN) $(BIN)/python -m pytest -rfEP --durations=12 -m images_nightly tests/images

# Every method once on one task, fewer rounds: up to 25 minutes. The whole grid: fedspine reproduce --full, hours.
reproduce-nightly: $(VENV)/.installed
	$(RUN) $(BIN)/fedspine reproduce --quick

lint: $(VENV)/.installed $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cc csrc/*.h tests/csrc/*.cc benchmarks/arm/*.cc benchmarks/native/*.cc

# For x86-64 and AArch64, this Python, glibc 2.17 or newer; each is tried before it counts.
wheels: $(VENV)/.installed $(VENV)/.dev $(WHEEL_TOOLS)/.installed
	sh cmake/wheels.sh

bench: $(VENV)/.installed $(VENV)/.dev $(ENGINES)/.installed
	$(RUN) $(BIN)/python benchmarks/bench_kernels.py --json benchmarks/results/kernels.json
	$(RUN) $(BIN)/python benchmarks/bench_memory.py --json benchmarks/results/memory-minilm.json
	$(RUN) $(BIN)/python benchmarks/bench_step.py --json benchmarks/results/step.json --plot benchmarks/results/step.svg
	$(RUN) $(BIN)/python benchmarks/bench_link.py --json benchmarks/results/link.json
	$(RUN) $(BIN)/python benchmarks/bench_scale.py --json benchmarks/results/scale.json
	FEDSPINE_CARRIERS_JSON=benchmarks/results/carriers.json $(RUN) $(BIN)/python -m pytest -rfEP tests/edge/test_engines.py

clean:
	rm -rf $(VENV) $(ENGINES) $(WHEEL_TOOLS) build dist

# --- set-up -------------------------------------------------------------------------------------------------------

$(VENV)/.tools: requirements/build.txt
	$(PYTHON) -m venv $(VENV) || { echo "error: cannot make $(VENV)" >&2; \
	  echo "hint: on Debian and Ubuntu: apt-get install python3-venv python3-dev g++ make" >&2; exit 1; }
	$(PIP) $(LOCKED) -r requirements/build.txt
	@touch $@

$(VENV)/.packages: requirements/run.txt requirements/torch.txt requirements/data.txt $(VENV)/.tools
	$(PIP) $(LOCKED) -r requirements/run.txt
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -r requirements/torch.txt
	$(PIP) $(LOCKED) -r requirements/data.txt
	@touch $@

# llama.cpp compiles for minutes: once a machine and version, then the wheel serves every clone.
$(LLAMA_BUILT): | $(VENV)/.tools
	@mkdir -p $(WHEELS)
	@echo "building llama.cpp once, some 4 minutes on 2 cores; the wheel is kept in $(WHEELS)"
	PATH="$(CURDIR)/$(BIN):$$PATH" CMAKE_ARGS="-DLLAVA_BUILD=OFF" CFLAGS="$(NO_AMX)" CXXFLAGS="$(NO_AMX)" \
	  CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) $(PIP) wheel --no-cache-dir --no-deps --no-build-isolation --require-hashes -r requirements/llama.txt -w $(WHEELS)
	@touch $@

$(VENV)/.installed: $(NATIVE_SOURCES) $(VENV)/.packages $(LLAMA_BUILT)
	$(PIP) install --force-reinstall --no-deps $(WHEELS)/llama_cpp_python-$(LLAMA)-*.whl
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# Flower pins older releases of what run.txt has newer, so its programs live in an environment of their own, which sees
# this source tree. Python 3.11 or newer.
$(WHEEL_TOOLS)/.installed: requirements/wheels.txt
	$(PYTHON) -m venv $(WHEEL_TOOLS)
	$(WHEEL_TOOLS)/bin/python -m pip --quiet --disable-pip-version-check $(LOCKED) -r requirements/wheels.txt
	@touch $@

$(ENGINES)/.installed: requirements/flower.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip --quiet --disable-pip-version-check $(LOCKED) -r requirements/flower.txt
	printf '%s\n' '$(CURDIR)/python' '$(CURDIR)/server' > \
	  "$$($(ENGINES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/fedspine.pth"
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.packages
	$(PIP) $(LOCKED) -r requirements/dev.txt
	@touch $@

# Debian's own browser and Prometheus; playwright drives that browser and brings none along.
$(VENV)/.browser:
	@for tool in chromium prometheus promtool; do command -v $$tool >/dev/null || missing=1; done; \
	if [ -n "$$missing" ]; then if [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium prometheus >/dev/null || exit 1; else \
	  echo "error: cannot find chromium or prometheus" >&2; echo "hint: apt-get install chromium prometheus" >&2; exit 1; fi; fi
	@touch $@
