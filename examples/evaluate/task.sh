#!/usr/bin/env bash
# One task, or several with the same number of shots, on an exported model.
# Usage: task.sh MODEL OUTPUT SHOTS TASK[,TASK...] [flags of lm_eval run]
#   MODEL   Hugging Face folder: of `convert megatron-to-hf`, or of `train --save-hf`
#   OUTPUT  folder for the results
#   SHOTS   examples in front of each question
# Variables: DEVICE (cuda), DTYPE (bfloat16), BATCH_SIZE (auto), MODEL_ARGS (more of them), LM_EVAL (lm_eval)
set -euo pipefail
MODEL=$(realpath "${1:?give the model: task.sh MODEL OUTPUT SHOTS TASKS}")
OUTPUT=${2:?give the folder for the results}
SHOTS=${3:?give the number of shots}
TASKS=${4:?give the tasks, as in arc_easy,boolq}
"${LM_EVAL:-lm_eval}" run --model hf --model_args "pretrained=$MODEL,dtype=${DTYPE:-bfloat16}${MODEL_ARGS:+,$MODEL_ARGS}" \
  --tasks "$TASKS" --num_fewshot "$SHOTS" --device "${DEVICE:-cuda}" --batch_size "${BATCH_SIZE:-auto}" \
  --output_path "$OUTPUT" --log_samples "${@:5}"
