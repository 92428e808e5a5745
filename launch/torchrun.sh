#!/usr/bin/env bash
# Start the trainer on every GPU of this node, or on all nodes of a job. Arguments go to the trainer.
#
#   launch/torchrun.sh --config digits
#   NPROC_PER_NODE=8 launch/torchrun.sh --config imagenet_resnet50_lesam --data.root /data/imagenet
#
# On several nodes, run the same line on each, with its own NODE_RANK:
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh --config ... --run_dir /shared/run
set -euo pipefail

NPROC_PER_NODE=${NPROC_PER_NODE:-auto} # processes on this node; auto: one per GPU, or per core where there is none
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29500}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # more than cores / processes makes CPU training several times slower

if [ "$NNODES" = 1 ]; then
  rendezvous=(--standalone) # any free port: two jobs on one node do not collide
else
  rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
fi
exec torchrun "${rendezvous[@]}" --nproc-per-node "$NPROC_PER_NODE" -m lesam_dist.train "$@"
