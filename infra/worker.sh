#!/usr/bin/env bash
# A Prefect worker inside a Ray cluster. Starts a Ray node that takes no work, and on it the Prefect worker, whose flow
# runs drive the cluster. Needs RAY_ADDRESS, RAY_AUTH_TOKEN_PATH, PREFECT_API_URL and PREFECT_API_AUTH_STRING. When one
# of the two ends, the script ends the other, so that the container can be restarted.
set -euo pipefail
: "${RAY_ADDRESS:?host:port of the Ray head}" "${PREFECT_API_URL:?address of the Prefect API}"

trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 143' TERM INT

ray start --address "$RAY_ADDRESS" --num-cpus 0 --num-gpus 0 --object-store-memory 209715200 --metrics-export-port 8080 \
  --node-manager-port 6380 --object-manager-port 6381 --block &
# The worker ends by SIGINT, which bash tells the programs that it starts in the background to ignore.
env --default-signal=INT prefect worker start --pool "${NEG_WORK_POOL:-neg}" --type process &
wait -n
