#!/usr/bin/env bash
# All that a GPU shows, in ten minutes: the tests, the sweeps in bf16 and fp32 beside the peers that are installed, the
# predictions beside the measurements, what it costs to shard, and a short run under compute-sanitizer where that is there.
#
#     bash perf/gpu.sh [FOLDER]        results in FOLDER, by default perf/out/<device>, which git ignores
#
# What is done is written when it is done: an interrupted run leaves everything before.
set -uo pipefail
cd "$(dirname "$0")/.."

device=$(python -c "
import re, sys, torch
if not torch.cuda.is_available():
    sys.exit('perf/gpu.sh: expected a GPU that PyTorch sees; python perf/sweep_k.py measures the CPU')
print(re.sub('[^A-Za-z0-9]+', '-', torch.cuda.get_device_name()).strip('-'))") || exit
folder=${1:-perf/out/$device}
mkdir -p "$folder/float32"

part() { # NAME SECONDS COMMAND...
    echo "+ ${*:3}"
    timeout "$2" "${@:3}" 2>&1 | tee "$folder/$1.txt"
    echo "  exit status ${PIPESTATUS[0]}" | tee -a "$folder/$1.txt"
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv | tee "$folder/device.csv"
part tests 210 python -m pytest -m gpu -n 8 -q --durations=10
part sweep_bfloat16 110 python perf/sweep_k.py --dtype bfloat16 --out "$folder"
part sweep_float32 110 python perf/sweep_k.py --dtype float32 --out "$folder/float32"
part sweep_shards 60 python perf/sweep_shards.py --out "$folder"
part prediction_bfloat16 30 python perf/kernel_budget.py --against "$folder/sweep_k.csv"
part prediction_float32 30 python perf/kernel_budget.py --against "$folder/float32/sweep_k.csv"
if command -v compute-sanitizer > /dev/null; then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # or an access beyond a tensor falls into its neighbour
    part sanitizer 50 compute-sanitizer --error-exitcode 1 python -m pytest -m gpu -q tests/test_gpu.py -k short_run
fi
