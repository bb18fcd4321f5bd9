#!/usr/bin/env bash
# One node's part of this run under torchrun: [VARIABLE=...] train.sh [flags of train], on every node alike.
# The variables that say which node this is stand on top of ../torchrun.sh; without them it is the only one.
#   MOLM     folder of the Hugging Face model
#   DATA     folder with chat, general, math and code, each with train.jsonl and dev.jsonl
#   RUN_DIR  where everything is written (runs/molm_paper)
set -euo pipefail
: "${MOLM:?set it to the folder of the Hugging Face model}" "${DATA:?set it to the folder of the sources}"
export GPUS_PER_NODE=${GPUS_PER_NODE:-4} # as the paper has it
here=$(dirname "$(realpath "$0")")
exec "$here/../torchrun.sh" "$here/RUN.yaml" --run-dir "${RUN_DIR:-runs/molm_paper}" "$@"
