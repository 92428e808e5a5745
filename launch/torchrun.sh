#!/usr/bin/env bash
# Start the trainer on every GPU of this node, or on all nodes of a job. Arguments go to the trainer.
#
#   launch/torchrun.sh --config digits
#   NPROC_PER_NODE=8 launch/torchrun.sh --config imagenet_resnet50_lesam --data.root /data/imagenet
#
# On several nodes, run the same line on each, with its own NODE_RANK:
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh --config ... --run_dir /shared/run
# or, where nodes may come and go, the very same line on each, with a range:
#   NNODES=1:4 RUN_ID=my_run MASTER_ADDR=node0 launch/torchrun.sh --config ... --run_dir /shared/run
#
# TERM, INT, USR1 or USR2 to this script: the run saves after its step, and the script ends with status 75, which says
# that the same line with --resume auto goes on. Ctrl-C again, two seconds later, ends it at once.
set -euo pipefail

# torchrun's own variables, PET_..., which Kubernetes' operators set, count where these do not say otherwise.
endpoint=${PET_RDZV_ENDPOINT:-localhost:29500}
NPROC_PER_NODE=${NPROC_PER_NODE:-${PET_NPROC_PER_NODE:-auto}} # on this node; auto: one per GPU, or core where there is none
NNODES=${NNODES:-${PET_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${PET_NODE_RANK:-0}}
MASTER_ADDR=${MASTER_ADDR:-${PET_MASTER_ADDR:-${endpoint%:*}}}
MASTER_PORT=${MASTER_PORT:-${PET_MASTER_PORT:-${endpoint##*:}}}
# With a range: what the nodes of this run, and no others on this port, have.
RUN_ID=${RUN_ID:-${PET_RDZV_ID:-${SLURM_JOB_ID:-none}}}
SHUTDOWN_SECONDS=${SHUTDOWN_SECONDS:-30} # more than checkpoint.grace_seconds; older torch kills after 30 whatever is here
PREEMPTED_STATUS=${PREEMPTED_STATUS:-75} # Kubeflow starts a pod again after a status of 128 and more only
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # more than cores / processes makes CPU training several times slower

# How often torchrun starts all processes again after one has failed. As torchrun itself, never on a fixed set of nodes:
# what was wrong once, a flag or a full disk, is wrong again. With a range a lost node must not end the run.
case $NNODES in *:*) restarts=3 ;; *) restarts=0 ;; esac
MAX_RESTARTS=${MAX_RESTARTS:-${PET_MAX_RESTARTS:-$restarts}}

# After a restart torchrun's shared store hands out the address of the one before (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$SHUTDOWN_SECONDS

case $NNODES in
  1) rendezvous=(--standalone) ;; # any free port: two jobs on one node do not collide
  *:*) rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$RUN_ID") ;;
  *) rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT") ;;
esac

case $NNODES in *:*) set -- --resume auto "$@" ;; esac # a node that comes begins anew in a folder that holds the run

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export LESAM_DIST_PREEMPTED=$scratch/preempted # the processes make this file when they have stopped as asked

# A group of its own: a terminal's Ctrl-C reaches this script alone, which passes it on once. torchrun breaks off the
# ending of its processes when a second one comes.
set -m
torchrun "${rendezvous[@]}" --max-restarts "$MAX_RESTARTS" --nproc-per-node "$NPROC_PER_NODE" \
  -m lesam_dist.train "$@" &
torchrun=$!

asked='' told=''
# shellcheck disable=SC2317 # by the traps
ask() { # once, as TERM: torchrun hands it to its processes, while USR1 and USR2 end torchrun alone (torch 2.9 to 2.14)
  told=$1
  if [ -z "$asked" ]; then
    asked=$SECONDS
    kill -TERM "$torchrun" 2>/dev/null || true
  elif [ "$1" = INT ] && [ $((SECONDS - asked)) -gt 1 ]; then
    kill -KILL "$torchrun" 2>/dev/null || true # its processes notice within a second, and end
    exit 130
  fi
}
for name in TERM INT USR1 USR2; do
  # shellcheck disable=SC2064 # the name of now
  trap "ask $name" "$name"
done

while :; do
  told=''
  wait "$torchrun" && status=0 || status=$?
  [ -n "$told" ] || break # else a signal has ended the wait
done
[ ! -e "$LESAM_DIST_PREEMPTED" ] || status=$PREEMPTED_STATUS
exit "$status"
