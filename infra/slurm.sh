#!/usr/bin/env bash
#SBATCH --job-name=neg
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
# For GPUs: sbatch --gpus-per-task=4 infra/slurm.sh ..., and `gpus: 1` in the run file.
#
#   sbatch infra/slurm.sh pipeline RUN.yaml
#
# One run on a Ray cluster of its own. Submit it from an environment in which `neg` is installed, on storage that all
# nodes see. Two minutes before its time is up the run is stopped; the same command continues from the finished shards.
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}  # this script runs there
address=$(getent ahostsv4 "$head" | awk '{print $1; exit}')
port=$((20000 + SLURM_JOB_ID % 10000))

secrets=$HOME/.neg/$SLURM_JOB_ID
(
  umask 077
  mkdir -p "$secrets"
  od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$secrets/ray-token"
)

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$secrets/ray-token" DO_NOT_TRACK=1
export RAY_ENABLE_AUTO_CONNECT=0 RAY_USAGE_STATS_ENABLED=0 RAY_SCHEDULER_EVENTS=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0

clean() {
  kill "${parts[@]}" 2>/dev/null || true
  wait
  rm -rf "$secrets"
}
parts=()
trap clean EXIT

common=(--num-cpus="$SLURM_CPUS_PER_TASK" --object-store-memory=209715200 --temp-dir="/tmp/ray-$SLURM_JOB_ID" --block)
srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$address" --port="$port" --include-dashboard=false "${common[@]}" &
parts+=($!)
until (: > "/dev/tcp/$address/$port") 2>/dev/null; do
  kill -0 "${parts[0]}"  # or Ray has failed to start
  sleep 1
done
if ((${#nodes[@]} > 1)); then
  others=$((${#nodes[@]} - 1))
  srun --nodes="$others" --ntasks="$others" --exclude="$head" ray start --address="$address:$port" "${common[@]}" &
  parts+=($!)
fi

# In the background, because bash acts on a signal only between commands.
RAY_ADDRESS=$address:$port neg "$@" &
driver=$!
parts+=("$driver")
trap 'kill -TERM "$driver"' TERM INT
status=0
wait "$driver" || status=$?
while kill -0 "$driver" 2>/dev/null; do
  status=0
  wait "$driver" || status=$?
done
exit "$status"
