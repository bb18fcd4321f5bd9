#!/usr/bin/env bash
# One node's part of a run. Start it on every node with the same arguments:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 torchrun.sh RUN.yaml --run-dir DIR [flags of train]
# RUN.yaml, its sources and DIR must lie where every node finds them. Environment:
#   NNODES          how many nodes (1)
#   NODE_RANK       which one this is, from 0; node 0 is the one at MASTER_ADDR
#   MASTER_ADDR     address of node 0
#   MASTER_PORT     a port that is free there (29500)
#   GPUS_PER_NODE   ranks on this node (8)
#   MAX_RESTARTS    how often the ranks are started again after a failure, from the last checkpoint (0)
#   SAVE_SECONDS    how long ranks that are asked to stop may take for it (300)
#   LOCAL_ADDR      address of this node for the others, where its host name does not lead to it
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME  the network interface, where the first one is not the right one
set -euo pipefail
: "${NNODES:=1}"
if [ "$NNODES" = 1 ]; then # it meets itself, whatever the machine is called
  NODE_RANK=0 MASTER_ADDR=127.0.0.1
fi
: "${NODE_RANK:?which of $NNODES nodes this one is, from 0}" "${MASTER_ADDR:?address of node 0}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# Megatron-Core hides communication behind computation only where kernels start in the order of their launch
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# experts get another number of tokens in every step: fixed blocks of memory would leave gaps
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# exec: a scheduler's signals must reach torchrun. It passes on those that it is told of, and kills ranks
# that have not ended after the shutdown timeout. The dashes keep its hands off our flags.
exec "${PYTHON:-python3}" -m torch.distributed.run \
  --nnodes "$NNODES" --nproc-per-node "${GPUS_PER_NODE:-8}" --node-rank "$NODE_RANK" \
  --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" --max-restarts "${MAX_RESTARTS:-0}" \
  ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${SAVE_SECONDS:-300}" \
  -m -- megatron_dynmix train --resume auto "$@"
