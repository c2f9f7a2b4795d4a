#!/usr/bin/env bash
# Tell a webhook of failed and crashed runs: notify.sh URL. Needs PREFECT_API_URL, and PREFECT_API_AUTH_STRING if the
# server has a password. The server itself calls the URL, and keeps it encrypted.
set -euo pipefail
url=${1:?usage: notify.sh URL}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

block=$(URL=$url python -c '
import os
from prefect.blocks.webhook import Webhook
print(Webhook(method="POST", url=os.environ["URL"]).save("neg", overwrite=True))' | tail -n 1)
sed "s/00000000-0000-0000-0000-000000000000/$block/" "$(dirname "$0")/notification.yaml" > "$folder/notification.yaml"
prefect automation create --from-file "$folder/notification.yaml"
