#!/usr/bin/env bash
# Everything that docs/performance.md says of the CPU, measured in one go on a machine that does nothing else:
#
#   benchmarks/cpu_check.sh FOLDER          rows as FOLDER/*.json, about a quarter of an hour on 2 cores
#   python benchmarks/tables.py             after FOLDER's files have gone to benchmarks/results/cpu
set -euo pipefail
folder=${1:?"benchmarks/cpu_check.sh FOLDER: where should the rows go?"}
mkdir -p "$folder"
threads=$(python -c 'import torch; print(torch.get_num_threads())')

layer() {  # layer FILE OPTIONS...
  local file=$1
  shift
  gunn bench layer "$@" --json "$folder/$file.json"
}

layer layers --peers 'ours*;sunn;eager'
layer bfloat16 --dtype bfloat16 --peers 'ours;sunn'
layer p-equals-n p-equals-n --peers ours
for count in 1 "$threads"; do
  for batch in 1 2 16; do
    layer "threads-$count-batch-$batch" --threads "$count" --batch "$batch" --peers ours --format nchw
  done
done
layer gunn24 gunn24-1 --batch 4 --peers 'ours;sunn;eager' --repeats 5
for batch in 2 8; do
  layer "gunn18-batch-$batch" gunn18-1 gunn18-2 gunn18-3 gunn18-4 --batch "$batch" --peers 'ours;sunn;eager' --repeats 5
done
gunn bench memory --json "$folder/memory.json"
# torch.compile takes minutes for a layer of many segments.
layer compiled gunn15-32 --pass training --format nchw --peers 'ours;eager compiled'
