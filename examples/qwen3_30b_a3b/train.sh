#!/usr/bin/env bash
# One node's part of this run under torchrun: [VARIABLE=...] train.sh [flags of train], on every node alike.
# The variables that say which node this is stand on top of ../torchrun.sh; without them it is the only one.
#   QWEN3    folder of the Hugging Face model
#   DATA     folder with chat, general, math and code, each with train.jsonl and dev.jsonl
#   RUN_DIR  where everything is written (runs/qwen3_30b_a3b)
set -euo pipefail
: "${QWEN3:?set it to the folder of the Hugging Face model}" "${DATA:?set it to the folder of the sources}"
export SAVE_SECONDS=${SAVE_SECONDS:-600} # one iteration, and one save of a checkpoint of this size
here=$(dirname "$(realpath "$0")")
exec "$here/../torchrun.sh" "$here/RUN.yaml" --run-dir "${RUN_DIR:-runs/qwen3_30b_a3b}" "$@"
