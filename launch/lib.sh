# shellcheck shell=bash
# What the launch scripts share: options, settings, the error line, gcloud, the state of the pod.
# Sourced, not run. A script's header comment is its --help.
# shellcheck disable=SC2034  # the scripts use what is set here
set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: [bash]: is too old, expected 4.4 or later, found $BASH_VERSION" >&2
  exit 2
fi

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REMOTE=.tiue_jax # our folder in the home of every worker
TMP=$(mktemp -d)
trap 'rm -rf "$TMP"' EXIT

# ---- Saying ---------------------------------------------------------------------------------

say() { printf 'launch: %s\n' "$*" >&2; }

# One line on standard error, whatever the text holds. Args: exit code, text.
fail() {
  printf 'error: %s\n' "${2//[[:cntrl:]]/ }" >&2
  exit "$1"
}

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# ---- Options and settings -------------------------------------------------------------------

DRY_RUN=no
SETTINGS=
EXTRA=()         # what follows `--` on the command line
declare -A FLAG=() # options that one script has and others have not

# Args: the script's own options as one word ("stop"), then its command line.
parse_options() {
  local own=" $1 "
  shift
  while (($#)); do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --dry-run) DRY_RUN=yes ;;
      --) shift && EXTRA=("$@") && break ;;
      --*) [[ $own == *" ${1#--} "* ]] || fail 2 "[$1]: no such option; --help lists them"
        FLAG[${1#--}]=yes ;;
      -*) fail 2 "[$1]: no such option; --help lists them" ;;
      *) [[ -z $SETTINGS ]] || fail 2 "[$1]: more than one settings file, found $SETTINGS before"
        SETTINGS=$1 ;;
    esac
    shift
  done
  SETTINGS=${SETTINGS:-$LAUNCH/pod.env}
  read_settings
}

PROJECT='' ZONE='' NAME='' ACCELERATOR_TYPE='' TOPOLOGY='' RUNTIME_VERSION='' SPOT=no
REPO='' BRANCH=main CONFIG='' WORKDIR='' HF_TOKEN_FILE=''
CREATE_ATTEMPTS=8 WAIT_HOURS=24 MAX_RESTARTS=100 RETRY_SECONDS=60 POLL_SECONDS=30 GRACE_SECONDS=120
CREATE_FLAGS=() ARGS=()

# The file is data, KEY=VALUE to the end of the line: nothing in it is run, quotes and $ stand for
# themselves. So there are no escapes to learn, and a stranger's file can do no harm.
read_settings() {
  local line key value number=0
  local -A seen=()
  [[ -f $SETTINGS && -r $SETTINGS ]] ||
    fail 2 "$SETTINGS: cannot be read, expected a copy of launch/pod.env.example"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'}
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    [[ $line =~ ^([A-Z_]+)=(.*)$ ]] || fail 2 "$SETTINGS:$number: not a setting, expected KEY=VALUE"
    key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    [[ -z ${seen[$key]:-} || $key == ARG || $key == CREATE_FLAG ]] ||
      fail 2 "$SETTINGS:$number [$key]: given twice, found it in line ${seen[$key]}"
    seen[$key]=$number
    check_setting "$SETTINGS:$number [$key]" "$key" "$value"
    case $key in
      ARG) ARGS+=("$value") ;;
      CREATE_FLAG) CREATE_FLAGS+=("$value") ;;
      *) printf -v "$key" %s "$value" ;;
    esac
  done <"$SETTINGS"
  for key in NAME ZONE ACCELERATOR_TYPE CONFIG WORKDIR; do
    [[ -n ${!key} ]] || fail 2 "$SETTINGS [$key]: is required"
  done
  for value in ${EXTRA[@]+"${EXTRA[@]}"}; do check_setting "[--]" ARG "$value"; done
  complete_settings
}

# Args: place for the message, key, value. Values that may be secret are not shown.
check_setting() {
  local where=$1 key=$2 value=$3 pattern expected
  if [[ $value =~ hf_[A-Za-z0-9]{16} || $value =~ ://[^/]*:[^/]*@ ]]; then
    fail 2 "$where: looks like a secret, expected none here: HF_TOKEN_FILE names a file that has it"
  fi
  case $key in
    NAME) pattern='^[a-z]([-a-z0-9]{0,37}[a-z0-9])?$' expected='a-z, 0-9 and -, at most 39' ;;
    PROJECT) pattern='^([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]$' expected='a project id' ;;
    ZONE) pattern='^[a-z]+-[a-z]+[0-9]+-[a-z]$' expected='a zone such as us-west4-a' ;;
    ACCELERATOR_TYPE) pattern='^(v4|v5litepod|v5p|v6e)(-[1-9][0-9]*)?$'
      expected='v4-N, v5litepod-N, v5p-N or v6e-N' ;;
    TOPOLOGY) pattern='^[1-9][0-9]*(x[1-9][0-9]*){1,2}$' expected='2x4 or 2x2x4' ;;
    RUNTIME_VERSION) pattern='^[a-z0-9][-a-z0-9.]*$' expected='a name such as v2-alpha-tpuv6e' ;;
    SPOT) pattern='^(yes|no)$' expected='yes or no' ;;
    REPO) pattern='^(https://|ssh://|git@)[^[:space:]]+$' expected='an https or ssh address' ;;
    BRANCH) pattern='^[A-Za-z0-9_][-A-Za-z0-9._/]*$' expected='a branch or tag' ;;
    CONFIG) pattern='^[^-/[:space:]][^[:space:]]*\.py(:.*)?$'
      expected='a file such as configs/sd15.py' ;;
    WORKDIR) pattern='^(gs://[a-z0-9][-a-z0-9._]+[a-z0-9]/[^/].*|/.+)$'
      expected='gs://BUCKET/FOLDER or an absolute path' ;;
    HF_TOKEN_FILE | ARG) pattern='^.+$' expected='not nothing' ;;
    CREATE_FLAG) pattern='^--[a-z]' expected='a flag of gcloud' ;;
    CREATE_ATTEMPTS | WAIT_HOURS | MAX_RESTARTS | RETRY_SECONDS | POLL_SECONDS | GRACE_SECONDS)
      pattern='^[0-9]{1,6}$' expected='a whole number' ;;
    *TOKEN* | *SECRET* | *PASSWORD* | *KEY*)
      fail 2 "$where: a secret has no place in this file, expected HF_TOKEN_FILE=FILE" ;;
    *) fail 2 "$where: no such setting, expected one of launch/pod.env.example" ;;
  esac
  [[ $value =~ $pattern ]] || fail 2 "$where: not usable, expected $expected, found '$value'"
}

# What follows from other settings, and what does not fit together.
complete_settings() {
  local family=${ACCELERATOR_TYPE%%-*}
  case $family in # docs.cloud.google.com/tpu/docs/runtimes
    v4) : "${RUNTIME_VERSION:=tpu-ubuntu2204-base}" ;;
    v5litepod) : "${RUNTIME_VERSION:=v2-alpha-tpuv5-lite}" ;;
    v5p) : "${RUNTIME_VERSION:=v2-alpha-tpuv5}" ;;
    v6e) : "${RUNTIME_VERSION:=v2-alpha-tpuv6e}" ;;
  esac
  if [[ -n $TOPOLOGY ]]; then
    [[ $ACCELERATOR_TYPE == "$family" ]] ||
      fail 2 "$SETTINGS [TOPOLOGY]: says the size again, expected ACCELERATOR_TYPE=$family with it"
    SHAPE=(--type="$family" --topology="$TOPOLOGY")
  else
    [[ $ACCELERATOR_TYPE != "$family" ]] ||
      fail 2 "$SETTINGS [ACCELERATOR_TYPE]: has no size, expected $family-N, or TOPOLOGY=..."
    SHAPE=(--accelerator-type="$ACCELERATOR_TYPE")
  fi
  if [[ -n $HF_TOKEN_FILE ]]; then
    HF_TOKEN_FILE=${HF_TOKEN_FILE/#\~\//$HOME/}
    [[ -r $HF_TOKEN_FILE ]] || fail 2 "$SETTINGS [HF_TOKEN_FILE]: cannot be read: $HF_TOKEN_FILE"
    [[ $(ls -ldL -- "$HF_TOKEN_FILE") =~ ^-r..------ ]] ||
      fail 2 "$HF_TOKEN_FILE [HF_TOKEN_FILE]: others may read it, expected mode 600 (chmod 600)"
  fi
  ARGS+=(${EXTRA[@]+"${EXTRA[@]}"})
  PLACE=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
  PACKAGE=${XDG_CACHE_HOME:-$HOME/.cache}/tiue_jax/$NAME.tgz # of the code, see setup_tpu.sh
  WORKDIR_BUCKET=$(bucket_of "$WORKDIR")
  mapfile -t BUCKETS < <({
    bucket_of "$WORKDIR"
    for value in ${ARGS[@]+"${ARGS[@]}"}; do bucket_of "${value#*=}"; done
  } | sort -u)
  [[ $DRY_RUN == yes ]] || command -v gcloud >/dev/null ||
    fail 2 "[gcloud]: is not on PATH, expected the Google Cloud CLI"
}

# The bucket of a gs:// address; nothing for anything else.
bucket_of() { if [[ $1 =~ ^gs://([^/]+) ]]; then echo "${BASH_REMATCH[1]}"; fi; }

# ---- gcloud ---------------------------------------------------------------------------------

# Runs a command, or with --dry-run prints it so that a shell would read it back.
run() {
  if [[ $DRY_RUN == yes ]]; then
    printf '+' && printf ' %q' "$@" && echo
  else
    "$@" </dev/null
  fi
}

queued() { run gcloud compute tpus queued-resources "$1" "$NAME" "${PLACE[@]}" "${@:2}"; }

# Runs on_worker.sh on one worker or "all". %q makes one word of every argument for the shell there.
# gcloud repeats an ssh that broke up to ten times: every action must be harmless a second time.
on_workers() {
  local command
  printf -v command '%q ' bash "$REMOTE/on_worker.sh" "${@:2}"
  remote_shell "$1" "${command% }"
}

# Keep-alives, because a preempted machine closes no connection.
remote_shell() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker="$1" \
    --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4 --command="$2"
}

delete_pod() { queued delete --force --quiet; } # --force: the node goes with its queued resource

# Prints the value of a `describe`, ABSENT if there is no such thing; fails as gcloud fails.
describe() {
  local code=0 found
  found=$(gcloud compute tpus "$1" describe "$NAME" "${PLACE[@]}" --format="$2" \
    </dev/null 2>"$TMP/describe") || code=$?
  if ((code == 0)); then
    echo "$found"
  elif grep -qi 'not[_ ]found' "$TMP/describe"; then
    echo ABSENT
  else
    cat "$TMP/describe" >&2
    return "$code"
  fi
}

# Sets STATE: ABSENT, WAITING, READY, DEAD (to be deleted and created again), or UNKNOWN, where
# gcloud could not say and STATE_CODE is its exit code. QUEUED, NODE, HEALTH: gcloud's words.
pod_state() {
  QUEUED='' NODE='' HEALTH='' STATE=UNKNOWN STATE_CODE=0
  QUEUED=$(describe queued-resources 'value(state.state)') || { STATE_CODE=$? && return 0; }
  case $QUEUED in
    ABSENT) STATE=ABSENT && return ;;
    SUSPENDED | FAILED) STATE=DEAD && return ;;
    ACTIVE) ;;
    *) STATE=WAITING && return ;; # in the queue, being made or being deleted
  esac
  local line
  line=$(describe tpu-vm 'value(state,health)') || { STATE_CODE=$? && return 0; }
  read -r NODE HEALTH <<<"$line"
  case $NODE in
    READY) STATE=READY ;;
    PREEMPTED | TERMINATED | ABSENT) STATE=DEAD ;;
    *) STATE=WAITING ;;
  esac
}
