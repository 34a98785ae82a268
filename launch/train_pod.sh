#!/usr/bin/env bash
# Trains on all workers of the TPU until the run is done, through preemptions.
#
#   launch/train_pod.sh [--dry-run | --stop] [SETTINGS] [-- ARGS of the training]
#
#   launch/train_pod.sh                                CONFIG, WORKDIR and ARGs of launch/pod.env
#   launch/train_pod.sh launch/pod.env -- --config.train.batch_size=256
#   launch/train_pod.sh --stop                         save, and end (exit code 75 on the workers)
#
# Starts the same command on every worker, shows the log of worker 0, and waits for the end. A TPU
# that is not there is created, one that is not set up is set up (create_tpu.sh, setup_tpu.sh).
# The training does not depend on this terminal: after Ctrl-C or a lost connection the same command
# follows it again, from where it was last shown.
#
# Starts again, from the newest checkpoint: a run that was told to stop and saved (75); one whose
# TPU was preempted, which is deleted and created again; one that was killed, but no more than three
# times in a row within half an hour of its start. MAX_RESTARTS is the limit of all together. Bad
# input (2) and a failure (1) of the training are not repeated; a set-up that fails is, twice.
#
# Exit code: 0 done; 1 the training failed, or crashed too often; 2 bad input, here or there;
# 75 MAX_RESTARTS reached, the same command goes on; 130 Ctrl-C; else gcloud's, which 255 is for a
# lost connection.

# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
parse_options "stop" "$@"

AGAIN=75 CRASHED=70 STOPPED=71 LOST=255 # AGAIN is the training's own exit code
SETTLE_SECONDS=180                    # JAX notices a lost worker after 100 s, and ends the others
MAX_CRASHES=3 MAX_RECONNECTS=20
START=(start "$WORKDIR" "$CONFIG" ${ARGS[@]+"${ARGS[@]}"})
READY=(ready ${BUCKETS[@]+"${BUCKETS[@]}"})

if [[ ${FLAG[stop]:-no} == yes ]]; then
  on_workers all stop 900
  exit 0
fi

if [[ $DRY_RUN == yes ]]; then
  echo "# unless the node is READY:"
  "$LAUNCH/create_tpu.sh" --dry-run "$SETTINGS"
  on_workers all "${READY[@]}"
  echo "# if that fails:"
  "$LAUNCH/setup_tpu.sh" --dry-run --keep-source "$SETTINGS" -- ${EXTRA[@]+"${EXTRA[@]}"}
  on_workers all state
  on_workers all "${START[@]}"
  on_workers 0 follow
  on_workers all settle "$SETTLE_SECONDS"
  exit 0
fi

trap 'say "stopped following; the training goes on, and the same command follows it"; exit 130' INT

# What the workers said, one line each, without the noise of a login.
answers() { on_workers all "$@" >"$TMP/answers" || return; }
count() { grep -cE "^tiue-worker $1" "$TMP/answers" || true; }

# Creates and sets up what is missing.
bring_up() {
  local code=0
  pod_state
  [[ $STATE == READY ]] || "$LAUNCH/create_tpu.sh" "$SETTINGS" || exit
  on_workers all "${READY[@]}" 2>"$TMP/ready" || code=$?
  case $code in
    0) ;;
    "$LOST") cat "$TMP/ready" >&2 && return "$LOST" ;;
    *) set_up ;;
  esac
}

# What fails for a moment is no end of a run of days. Bad input is, and a lost connection or a TPU
# that is gone is somebody else's matter.
set_up() {
  local tries code
  for tries in 1 2 3; do
    code=0
    "$LAUNCH/setup_tpu.sh" --keep-source "$SETTINGS" -- ${EXTRA[@]+"${EXTRA[@]}"} || code=$?
    case $code in 0 | 2 | "$LOST") return "$code" ;; esac
    if ((tries == 3)) || is_going_away 0; then return "$code"; fi
    say "the set-up failed (exit code $code); trying again in $RETRY_SECONDS s"
    sleep "$RETRY_SECONDS"
  done
}

# One stretch: start, or join what is running, and follow to the end. What we started and lost sight
# of may have ended: that end counts, it is not started again. Returns 0, 1, 2, AGAIN, CRASHED,
# STOPPED, or what gcloud returned.
stretch() {
  bring_up || return
  answers state || return
  reconnects=0 # those of days are none too many, if each one worked
  if (($(count running) < $(count ''))) && [[ $started == no || $(count none) != 0 ]]; then
    if (($(count running))); then answers settle 0 || return; fi # of a start that half succeeded
    on_workers all "${START[@]}" || return
  fi
  started=yes
  on_workers 0 follow || return
  answers settle "$SETTLE_SECONDS" || return
  judge
}

# What a worker complains of is what all end with. One that was killed complains of nothing, and the
# others end with 1 because they miss it.
judge() {
  if (($(count 'ended 2$'))); then return 2; fi
  if (($(count 'ended 0$') == $(count ''))); then return 0; fi
  if (($(count stopped))); then return "$STOPPED"; fi
  if (($(count 'ended 75$'))); then return "$AGAIN"; fi
  if (($(count lost) + $(count 'ended 1[0-9][0-9]$'))); then return "$CRASHED"; fi
  return 1
}

# Whether the node goes away within GRACE_SECONDS. The state lags behind the machines, and workers
# that have lost one of theirs fail before it says so.
is_going_away() {
  local end=$((SECONDS + ${1:-$GRACE_SECONDS}))
  while pod_state && [[ $STATE == READY || $STATE == UNKNOWN ]]; do
    ((SECONDS < end)) || return 1
    sleep "$((POLL_SECONDS < 10 ? POLL_SECONDS : 10))"
  done
}

restarts=0 crashes=0 reconnects=0 started=no
while true; do
  code=0 began=$SECONDS
  stretch || code=$?
  ((SECONDS - began < 1800)) || crashes=0
  case $code in
    0) say "$NAME: done" && exit 0 ;;
    2) fail 2 "$NAME: bad input; its message is above" ;;
    "$STOPPED") fail "$AGAIN" "$NAME: stopped; the same command goes on" ;;
    "$LOST")
      if ! is_going_away 0; then
        reconnects=$((reconnects + 1))
        ((reconnects <= MAX_RECONNECTS)) || fail "$LOST" "$NAME: no connection to the workers"
        say "connection lost, the training goes on; trying again in $RETRY_SECONDS s"
        sleep "$RETRY_SECONDS"
        continue
      fi
      why="the TPU is gone ($QUEUED${NODE:+, $NODE})"
      ;;
    *)
      if is_going_away; then
        why="the TPU is gone ($QUEUED${NODE:+, $NODE})"
      elif ((code == AGAIN)); then
        why="the training was told to stop, and saved"
      elif ((code == CRASHED)); then
        crashes=$((crashes + 1)) why="the training was killed"
        ((crashes <= MAX_CRASHES)) || fail 1 "$NAME: killed $crashes times soon after its start"
      else
        fail "$code" "$NAME: failed (exit code $code); the log is above"
      fi
      ;;
  esac
  restarts=$((restarts + 1)) started=no
  ((restarts <= MAX_RESTARTS)) ||
    fail "$AGAIN" "[MAX_RESTARTS]: given up after $MAX_RESTARTS restarts; the same command goes on"
  say "$why; restart $restarts of at most $MAX_RESTARTS in $RETRY_SECONDS s"
  sleep "$RETRY_SECONDS"
done
