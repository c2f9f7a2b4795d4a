#!/usr/bin/env bash
# Entrypoint of the image. Prefect wants its secrets as values: read them from files, then become the command.
set -euo pipefail

for name in PREFECT_API_AUTH_STRING PREFECT_SERVER_API_AUTH_STRING PREFECT_SERVER_DATABASE_PASSWORD; do
  file="${name}_FILE"
  if [[ -n "${!file:-}" ]]; then
    value=$(<"${!file}")
    export "$name=$value"
    unset "$file"
  fi
done

exec "$@"
