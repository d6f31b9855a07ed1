# The steps of .ci/run, each run in the clean tree. Sourced, not called.

make_ours() { make VENV="$VENV" TORCH="$CPU_TORCH" PYTHON="$PYTHON" "$@"; }

# Runs a command with its output in a log that is shown only when it fails.
quiet() {
  local log=$LOGS/$1.log
  shift
  "$@" >"$log" 2>&1 || { tail -n 150 "$log"; echo "FAILED: $*"; return 1; }
}

# An environment with a torch and, after it, the packages named.
new_venv() {
  "$PYTHON" -m venv "$1" && "$1/bin/python" -m pip install -q --upgrade pip && "$1/bin/python" -m pip install -q "${@:2}"
}

step_lint() { make_ours lint; }

# GPU results travel with the code: are these of this code?
step_report() { "$PYTHON" tests/gpu_report.py --check; }

# `make test` as the README has it, with every warning in our sources an error. A folder that is given with -isystem
# too is a system folder for gcc, which leaves torch's and Python's own headers out.
step_cpu() {
  make_ours "$VENV/.torch" >/dev/null
  local system
  system=$("$VENV/bin/python" -c "
import sysconfig; from torch.utils.cpp_extension import include_paths
print(*('-isystem ' + p for p in [*include_paths(), sysconfig.get_path('include')]))")
  export CFLAGS="-Wall -Wextra -Werror $system"
  # On its own first: installing the package compiles too, and would leave this build nothing to do and to log.
  make_ours build
  grep -q -- -Werror build/log || { echo "the build did not use -Werror"; return 1; }
  make_ours test CMAKE_ARGS=-DDORA_EXT_WERROR=ON
}

# PEFT's own tests of DoRA give the same outcomes on our kernels.
step_peft() { make_ours peft-test; }

# A few steps of the README's first command, with nothing there but what it installs by itself.
step_demo() {
  make VENV="$WORK/demo" TORCH="$CPU_TORCH" PYTHON="$PYTHON" demo ARGS=--quick
  test -s demo-output/training.png -a -s demo-output/adapter_model.safetensors
}

# Source archive -> wheel -> an environment with torch alone; then without the wheel's kernels, just in time.
step_wheel() {
  new_venv "$WORK/empty" "$CPU_TORCH" numpy
  make_ours "$VENV/.torch" >/dev/null
  "$VENV/bin/python" -m pip install -q build
  quiet sdist "$VENV/bin/python" -m build --no-isolation --sdist --outdir "$WORK/dist" .
  DORA_EXT_CUDA=0 PATH="$VENV/bin:$PATH" quiet wheel "$VENV/bin/python" -m pip wheel -q --no-build-isolation --no-deps \
    -w "$WORK/dist" "$WORK"/dist/*.tar.gz
  ls -l "$WORK/dist"
  "$WORK/empty/bin/python" -m pip install -q "$WORK"/dist/*.whl
  cp .ci/smoke.py "$WORK/"
  cd "$WORK"
  export TORCH_EXTENSIONS_DIR=$WORK/extensions
  empty/bin/python smoke.py prebuilt
  empty/bin/python -m dora_ext
  rm empty/lib/python3*/site-packages/dora_ext/_C*.so empty/lib/python3*/site-packages/dora_ext/_build_facts.json
  empty/bin/python smoke.py missing
  empty/bin/python -m pip install -q ninja
  DORA_EXT_CUDA=0 empty/bin/python smoke.py jit
}

# Several GB: fetched while the other steps run.
start_cuda_torch() {
  echo "fetching $CUDA_TORCH in the background"
  new_venv "$WORK/cuda" "$CUDA_TORCH" numpy 'setuptools>=77' wheel ninja >"$LOGS/cuda_torch.log" 2>&1 &
  CUDA_TORCH_JOB=$!
}

# Every kernel for three generations, whole, linked against a CUDA torch; there is no GPU here to run them on.
step_cuda() {
  # A step runs in a subshell, which cannot wait for the fetch; its shell can.
  while kill -0 "$CUDA_TORCH_JOB" 2>/dev/null; do sleep 2; done
  local python=$WORK/cuda/bin/python
  "$python" -c "import torch; assert torch.version.cuda, 'this torch has no CUDA'; print(torch.__version__, torch.version.cuda)" ||
    { tail -n 30 "$LOGS/cuda_torch.log"; echo "no CUDA build of torch to build against"; return 1; }
  unset CFLAGS
  # ptxas reports registers and spills of each kernel.
  DORA_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST="7.5;8.0;9.0" NVCC_APPEND_FLAGS="-Xptxas=-v" MAX_JOBS=2 \
    quiet cuda "$python" setup.py build_ext --inplace
  "$python" .ci/machine_code.py log "$LOGS/cuda.log"
  "$python" .ci/machine_code.py sass \
    "$("$python" -c "import triton, pathlib; print(pathlib.Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump')")" \
    dora_ext/_C*.so
  mkdir -p "$WORK/outside" && cp .ci/smoke.py "$WORK/outside/"
  local tree=$PWD
  cd "$WORK/outside"
  PYTHONPATH=$tree "$python" smoke.py prebuilt --cuda-build
  PYTHONPATH=$tree "$python" -m dora_ext
}
