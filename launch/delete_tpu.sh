#!/usr/bin/env bash
# Deletes the TPU, which ends its cost. What a run has saved in its bucket stays; the package of its
# code goes (setup_tpu.sh), so that the next TPU of this name begins with the code of then.
#
#   launch/delete_tpu.sh [--dry-run] [SETTINGS]        SETTINGS: launch/pod.env by default
#
#   launch/train_pod.sh --stop && launch/delete_tpu.sh     a checkpoint first, then the end
#
# Exit code: 0 gone, or was not there; 2 the settings are wrong; else gcloud's.

# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
parse_options "" "$@"

if [[ $DRY_RUN == no ]]; then
  pod_state
  if [[ $STATE == UNKNOWN ]]; then fail "$STATE_CODE" "$NAME: gcloud cannot describe it"; fi
  if [[ $STATE == ABSENT ]]; then
    rm -f "$PACKAGE"
    say "$NAME: there is none"
    exit 0
  fi
fi
delete_pod || fail $? "$NAME: gcloud could not delete it"
if [[ $DRY_RUN == yes ]]; then
  echo "# the package of the code, $PACKAGE, is deleted"
else
  rm -f "$PACKAGE"
  say "$NAME: deleted"
fi
