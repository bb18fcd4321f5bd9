#!/usr/bin/env bash
# The paper's knowledge and reasoning tasks on an exported model, and their table.
# Usage: paper.sh MODEL OUTPUT [flags of lm_eval run]; variables as of task.sh
# MBPP and MT-Bench run in harnesses of their own: README.md has their commands.
set -euo pipefail
MODEL=${1:?give the model: paper.sh MODEL OUTPUT}
OUTPUT=${2:?give the folder for the results}
here=$(dirname "$(realpath "$0")")
"$here/task.sh" "$MODEL" "$OUTPUT/mmlu" 5 mmlu "${@:3}"
"$here/task.sh" "$MODEL" "$OUTPUT/bbh" 3 bbh_fewshot "${@:3}"
"$here/task.sh" "$MODEL" "$OUTPUT/gsm8k" 8 gsm8k_cot "${@:3}"
"$here/task.sh" "$MODEL" "$OUTPUT/qa" 0 arc_easy,arc_challenge,boolq "${@:3}"
"${PYTHON:-python3}" "$here/table.py" "$OUTPUT"
