#!/usr/bin/env bash
# Everything that wants a GPU, in one go and without a network: the tests' GPU part, then the benchmark.
#   benchmarks/gpu_check.sh DIR     results and logs land in DIR
# Runs from the source tree with the Python, torch and Triton that are there (torch 2.6, Triton 3.6 or newer).
# Exit code: 0 all is well, 1 something failed (its log says what), 2 there is no GPU or no DIR.
set -uo pipefail

if [ $# -ne 1 ]; then
  echo "usage: benchmarks/gpu_check.sh DIR" >&2
  exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# The repository may be read-only for Triton's and inductor's caches.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$out/cache/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$out/cache/inductor}
unset TRITON_INTERPRET

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>"$out/torch.log"; then
  echo "no CUDA device that torch sees (see $out/torch.log)" >&2
  "$python" -m pixnerd_kernels.cli info >"$out/info.txt" 2>&1
  exit 2
fi

failed=0
step() { # name, seconds, command...
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local code=$?
  echo "$name: exit $code after $((SECONDS - begin)) s" | tee -a "$out/steps.txt"
  [ $code -eq 0 ] || failed=1
  return $code
}

: >"$out/steps.txt"
if command -v c++ >/dev/null; then
  step build 120 "$python" setup.py build_ext --inplace || echo "  the CPU core was not built; the GPU needs none of it"
fi
step info 60 "$python" -m pixnerd_kernels.cli info
step verify 120 "$python" -m pixnerd_kernels.cli verify --backend triton --json

# Each group compiles its own kernels: side by side they take the time of one.
pids=()
if "$python" -c 'import pytest' 2>/dev/null; then
  pytest=("$python" -m pytest -q -rfE --tb=short -p no:cacheprovider)
  field=tests/ops/test_neural_field_mlp.py
  step tests_sizes 240 "${pytest[@]}" $field -k "triton and test_sizes" & pids+=($!)
  step tests_options 240 "${pytest[@]}" $field -k "triton and test_options" & pids+=($!)
  step tests_packed 240 "${pytest[@]}" $field -k "triton and test_packed" & pids+=($!)
  step tests_field 240 "${pytest[@]}" $field \
    -k "triton and not test_sizes and not test_options and not test_packed" & pids+=($!)
  step tests_graph 240 "${pytest[@]}" tests/ops/test_neural_field_mlp_graph.py tests/gpu -k "triton and not opcheck" & pids+=($!)
  step tests_memory 240 "${pytest[@]}" tests/ops/test_neural_field_mlp_memory.py tests/ops/test_golden_blocks.py \
    -k triton & pids+=($!)
  step tests_jvp 240 "${pytest[@]}" tests/ops/test_neural_field_mlp_jvp.py -k "triton and not opcheck" & pids+=($!)
  step tests_decoder_jvp 240 "${pytest[@]}" tests/ops/test_pixel_decoder_jvp.py -k "triton and not opcheck" & pids+=($!)
  step tests_others 240 "${pytest[@]}" tests/ops/test_normalize_weights.py tests/ops/test_coordinate_encoding.py \
    -k "triton and not opcheck" & pids+=($!)
  step tests_layers 120 "${pytest[@]}" tests/nn/test_feed_forward.py & pids+=($!)
  step tests_blocks 240 "${pytest[@]}" tests/ops/test_{modulated_rms_norm,gated_residual,qk_norm_rope,swiglu}.py \
    -k "triton and not opcheck and not tangents" & pids+=($!)
  step tests_blocks_jvp 240 "${pytest[@]}" tests/ops/test_{modulated_rms_norm,gated_residual,qk_norm_rope,swiglu}.py \
    -k "triton and tangents and not opcheck" & pids+=($!)
  step tests_decoder 300 "${pytest[@]}" tests/ops/test_pixel_decoder.py -k "triton and not every_chunking" & pids+=($!)
  step tests_chunks 300 "${pytest[@]}" tests/ops/test_pixel_decoder.py -k "triton and every_chunking" & pids+=($!)
  step tests_golden 300 "${pytest[@]}" tests/ops/test_pixel_decoder_golden.py -k triton & pids+=($!)
  step tests_decoder_memory 300 "${pytest[@]}" tests/ops/test_pixel_decoder_memory.py -k triton & pids+=($!)
  step tests_decoder_graph 240 "${pytest[@]}" tests/ops/test_pixel_decoder_graph.py \
    -k "triton and not opcheck" & pids+=($!)
else
  echo "tests: pytest is not installed" | tee -a "$out/steps.txt"
fi
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done

step benchmark 300 "$python" -m benchmarks gpu --jobs 6 --out "$out"
cat "$out/gpu.md" 2>/dev/null
exit $failed
