#!/usr/bin/env bash
#SBATCH --job-name=neg
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#
#   sbatch --partition=P --account=A --time=8:00:00 infra/slurm.sh pipeline RUN.yaml
#
# One run on a Ray cluster of its own. Submit it from an environment in which `neg` is installed, on storage that all
# nodes see; options of sbatch replace those above, and the run sees the environment's variables. Two minutes before its
# time is up, the run is stopped and the job queued again, at most $NEG_REQUEUES times: it goes on from the finished
# shards. The job ends with the exit code of the run.
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}  # this script runs there
host=$(scontrol --oneliner show node "$head" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
address=$(getent ahostsv4 "$host" | awk '{print $1; exit}')
port=$((20000 + SLURM_JOB_ID % 10000))

mkdir -p -m 700 "$HOME/.neg"
rm -rf "$HOME/.neg/job-$SLURM_JOB_ID".*  # of an earlier start of this job, on a node that was lost
secrets=$(mktemp -d "$HOME/.neg/job-$SLURM_JOB_ID.XXXXXX")
(umask 077; od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$secrets/ray-token")

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$secrets/ray-token" DO_NOT_TRACK=1
export RAY_ENABLE_AUTO_CONNECT=0 RAY_USAGE_STATS_ENABLED=0 RAY_SCHEDULER_EVENTS=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0  # the driver ends first: nothing is left that a node should wait for

# A Ray node until the step is told to end, in a directory of this user's, with a path short enough for sockets.
ray_node='
  directory=$(mktemp -d /tmp/ray-XXXXXX)
  trap "rm -rf $directory" EXIT
  trap : TERM  # Slurm tells Ray as well
  ray start "$@" --num-cpus="$SLURM_CPUS_PER_TASK" --object-store-memory=209715200 --temp-dir="$directory/r" --block &
  status=0
  wait $! || status=$?
  wait
  exit "$status"'

start_ray_nodes() {  # COUNT OPTION... -- OPTION...: of srun, and of ray
  local count=$1 options=()
  shift
  while [[ $1 != -- ]]; do options+=("$1"); shift; done
  shift
  srun --nodes="$count" --ntasks="$count" --cpus-per-task="$SLURM_CPUS_PER_TASK" "${options[@]}" \
    bash -c "$ray_node" ray-node "$@" &
  steps+=($!)
}

clean() {
  trap - EXIT
  if ((${#steps[@]})); then
    scancel --quiet --signal=TERM "$SLURM_JOB_ID" || true  # the steps, not this script
    for _ in {1..30}; do
      kill -0 "${steps[@]}" 2>/dev/null || break
      sleep 1
    done
    kill "${steps[@]}" 2>/dev/null || true
  fi
  rm -rf "$secrets"
}
steps=()
trap clean EXIT

# Bash acts on a signal only between commands: what takes time runs in the background.
driver= is_time_up=
trap 'is_time_up=1; [[ ! $driver ]] || kill -TERM "$driver" 2>/dev/null || true' USR1
trap : TERM  # a job that is cancelled, or out of time: Slurm tells the driver as well

start_ray_nodes 1 --nodelist="$head" -- --head --node-ip-address="$address" --port="$port" --include-dashboard=false
until (: > "/dev/tcp/$address/$port") 2>/dev/null; do
  kill -0 "${steps[0]}"  # or Ray has failed to start
  sleep 1
done
others=$((${#nodes[@]} - 1))
if ((others)); then
  start_ray_nodes "$others" --exclude="$head" -- --address="$address:$port"
fi

RAY_ADDRESS=$address:$port neg "$@" &
driver=$!
[[ ! $is_time_up ]] || kill -TERM "$driver" 2>/dev/null || true
status=0
wait "$driver" || status=$?
while kill -0 "$driver" 2>/dev/null; do
  status=0
  wait "$driver" || status=$?
done
clean
if [[ $is_time_up ]] && ((status == 130 || status == 143)); then  # stopped, perhaps before it could say so
  if ((${SLURM_RESTART_COUNT:-0} < ${NEG_REQUEUES:-10})); then
    echo "the job's time is up: it is queued again, and the run goes on from its finished shards"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60  # Slurm ends this script
  else
    echo "the job's time is up, and it was queued again ${SLURM_RESTART_COUNT:-0} times: submit it again to go on"
  fi
fi
exit "$status"
