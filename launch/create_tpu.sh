#!/usr/bin/env bash
# Asks for the TPU of a settings file and waits until it is there.
#
#   launch/create_tpu.sh [--dry-run] [SETTINGS]        SETTINGS: launch/pod.env by default
#
#   cp launch/pod.env.example launch/pod.env           then fill it in
#   launch/create_tpu.sh --dry-run                     what would be run
#   launch/create_tpu.sh
#
# Makes a queued resource NAME with the node NAME, spot or on demand (SPOT). What is there already
# is kept and waited for; what was preempted (SUSPENDED, FAILED) is deleted and asked for again.
# A creation that fails for want of capacity is repeated CREATE_ATTEMPTS times, RETRY_SECONDS apart,
# doubling up to a quarter of an hour; one refused for another reason is not repeated. A deletion
# that fails, unless for want of a permission, is tried ten times. The wait in the queue ends after
# WAIT_HOURS.
#
# Exit code: 0 the node is READY; 1 given up; 2 the settings are wrong; else gcloud's.

# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
parse_options "" "$@"

CREATE=(--node-id="$NAME" "${SHAPE[@]}" --runtime-version="$RUNTIME_VERSION")
if [[ $SPOT == yes ]]; then CREATE+=(--spot); fi
CREATE+=(${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"})

if [[ $DRY_RUN == yes ]]; then
  queued create "${CREATE[@]}"
  queued describe --format='value(state.state)'
  exit 0
fi

# What may be otherwise a minute later; anything else (a permission, a wrong name) will not.
PASSING='RESOURCE_EXHAUSTED|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|INTERNAL|ALREADY_EXISTS|quota'

attempts=0 unknown=0 undeleted=0 shown='' pause=$RETRY_SECONDS
deadline=$((SECONDS + WAIT_HOURS * 3600))

# Counts a creation that came to nothing, and waits before the next. Args: exit code to end with.
try_later() {
  ((attempts < CREATE_ATTEMPTS)) ||
    fail "$1" "[CREATE_ATTEMPTS]: $NAME could not be created, given up after $attempts attempts"
  say "trying again in $pause s ($attempts of $CREATE_ATTEMPTS attempts made)"
  sleep "$pause"
  pause=$((pause * 2 < 900 ? pause * 2 : 900))
}

while true; do
  pod_state
  [[ $STATE == UNKNOWN || "$QUEUED $NODE" == "$shown" ]] ||
    say "$NAME: queued resource $QUEUED${NODE:+, node $NODE}"
  shown="$QUEUED $NODE"
  [[ $STATE == UNKNOWN ]] || unknown=0
  case $STATE in
    READY) exit 0 ;;
    ABSENT)
      attempts=$((attempts + 1)) code=0
      queued create "${CREATE[@]}" 2>"$TMP/create" || code=$?
      cat "$TMP/create" >&2
      if ((code)); then
        grep -qE "$PASSING" "$TMP/create" || fail "$code" "$NAME: gcloud could not create it"
        try_later "$code"
      fi
      ;;
    DEAD)
      code=0
      delete_pod 2>"$TMP/delete" || code=$?
      cat "$TMP/delete" >&2
      if ((code)); then # its preemption may still be going on
        undeleted=$((undeleted + 1))
        if ((undeleted == 10)) || grep -q PERMISSION_DENIED "$TMP/delete"; then
          fail "$code" "$NAME: gcloud could not delete it"
        fi
        say "not deleted; trying again in $RETRY_SECONDS s"
        sleep "$RETRY_SECONDS"
      else
        undeleted=0
        if ((attempts)); then try_later 1; fi # a first one is a preemption, not a failed creation
      fi
      ;;
    WAITING)
      ((SECONDS < deadline)) ||
        fail 1 "[WAIT_HOURS]: $NAME is not there after $WAIT_HOURS hours; it stays in the queue"
      sleep "$POLL_SECONDS"
      ;;
    UNKNOWN)
      unknown=$((unknown + 1))
      ((unknown < 10)) || fail "$STATE_CODE" "$NAME: gcloud cannot describe it"
      sleep "$POLL_SECONDS"
      ;;
  esac
done
