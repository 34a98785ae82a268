#!/usr/bin/env bash
# Shows the queued resource, the node, its health, and how far the training on worker 0 is.
#
#   launch/status.sh [--dry-run] [SETTINGS]            SETTINGS: launch/pod.env by default
#
#   $ launch/status.sh
#   queued resource tiue: ACTIVE
#   node tiue: READY, health HEALTHY
#   training on worker 0: running
#   latest step logged: 12350, newest checkpoint: 12000
#   ...the last lines of its log
#
# Exit code: 0 shown; 2 the settings are wrong; else gcloud's.

# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
parse_options "" "$@"

if [[ $DRY_RUN == yes ]]; then
  queued describe --format='value(state.state)'
  run gcloud compute tpus tpu-vm describe "$NAME" "${PLACE[@]}" --format='value(state,health)'
  on_workers 0 status "$WORKDIR" 15
  exit 0
fi
pod_state
if [[ $STATE == UNKNOWN ]]; then fail "$STATE_CODE" "$NAME: gcloud cannot describe it"; fi
echo "queued resource $NAME: $QUEUED"
if [[ -n $NODE ]]; then echo "node $NAME: $NODE, health ${HEALTH:-not known}"; fi
if [[ $STATE == READY ]]; then on_workers 0 status "$WORKDIR" 15; fi
