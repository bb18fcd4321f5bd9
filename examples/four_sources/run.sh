#!/usr/bin/env bash
# The whole story: tokenizer, prepare, train. Usage: run.sh DATA_FOLDER [WORK_FOLDER] [flags of train]
# DATA_FOLDER holds chat, general, math and code, each with train.jsonl and dev.jsonl (ShareGPT rows).
set -euo pipefail
DATA=$(realpath "${1:?give the data folder: run.sh DATA_FOLDER [WORK_FOLDER]}")
WORK=$(realpath -m "${2:-runs/four_sources}")
export DATA WORK
here=$(dirname "$(realpath "$0")")
python=${PYTHON:-python3}

if [ ! -f "$WORK/tokenizer/tokenizer.json" ]; then
  "$python" "$here/../../tools/train_tokenizer.py" --vocab-size 8192 --output "$WORK/tokenizer" \
    --input "$DATA"/{chat,general,math,code}/train.jsonl
fi
"$python" -m megatron_dynmix prepare "$here/RUN.yaml"
"$python" -m megatron_dynmix train "$here/RUN.yaml" --run-dir "$WORK/run" --nproc-per-node 2 "${@:3}"
