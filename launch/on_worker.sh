#!/usr/bin/env bash
# What the launch scripts do on a worker, where setup_tpu.sh copies it. People run the others.
#
#   on_worker.sh setup REPO BRANCH WORKDIR_BUCKET [BUCKET...]    code, Python, packages, mounts
#   on_worker.sh ready [BUCKET...]                               0 if that is still so
#   on_worker.sh start WORKDIR CONFIG [ARG...]                   begin, unless a run goes on
#   on_worker.sh follow                                          show the log until the run ends
#   on_worker.sh state | settle SECONDS | stop SECONDS           say how it stands; end what is left
#   on_worker.sh status WORKDIR LINES                            for people
#
# A run is `pid` (process and boot), `log`, and `code` once it has ended by itself: files, so that
# it and what we know of it outlive every connection. Everything here may be repeated.
set -euo pipefail

HERE=$HOME/.tiue_jax
PYTHON=$HERE/venv/bin/python
umask 077
cd "$HERE"

fail() {
  local text="${*:2}"
  trap - EXIT
  printf 'error: %s\n' "${text//[[:cntrl:]]/ }" >&2
  exit "$1"
}

# Readers see the old file or the new one. Args: name; the content comes from standard input.
put() {
  cat >"$1.$$.tmp"
  mv "$1.$$.tmp" "$1"
}

# ---- Setting up -----------------------------------------------------------------------------

setup() {
  exec 8>setup.lock && flock 8 # two set-ups at once are one after the other
  # Exit codes of tools are not ours: the 2 of tar or uv is no bad input.
  trap '(($? == 0)) || fail 1 "$(hostname): set-up failed: $BASH_COMMAND"' EXIT
  prepare "$@" 8>&- # gcsfuse stays when this has ended, and must not hold the lock
}

# Runs a command that needs the network, or a lock of the system, up to three times.
retry() {
  local tries code
  for tries in 1 2 3; do
    code=0
    "$@" || code=$?
    if ((code == 0)); then return; fi
    if ((tries < 3)); then sleep "${TIUE_RETRY_SECONDS:-20}"; fi
  done
  fail 1 "$(hostname): failed $tries times, the last with exit code $code: $*"
}

prepare() {
  local repo=$1 branch=$2 workdir_bucket=$3 bucket
  ! is_running || fail 2 "$(hostname): a training runs here, expected none: train_pod.sh --stop"
  rm -rf ready source.new
  if [[ -n $repo ]]; then
    retry git clone --quiet --depth=1 --branch="$branch" -- "$repo" source.new
  else
    mkdir source.new && tar -C source.new -xzf source.tgz
  fi
  rm -rf source && mv source.new source
  if [[ -e hf_token ]]; then chmod 600 hf_token; fi
  install_python
  for bucket in "${@:4}"; do mount_bucket "$bucket"; done
  if [[ -n $workdir_bucket ]]; then check_renames "$HOME/gcs/$workdir_bucket"; fi
  env -C source "$PYTHON" -m tiue_jax.main --help >/dev/null
  date -u +%FT%TZ | put ready
}

# The TPU images have Python 3.10, and tiue_jax wants 3.11: uv brings its own.
install_python() {
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || retry python3 -m pip install --quiet --user uv
  [[ -x $PYTHON ]] || retry uv venv --quiet --python=3.11 venv
  retry uv pip install --quiet --python="$PYTHON" -r source/requirements.txt 'jax[tpu]'
}

# No caching of names: a worker has to see at once what another one wrote, which gcsfuse does not
# promise by default. No copying where a rename is asked for, see check_renames. No streaming
# writes, gcsfuse's default since 3.0: fsync would publish nothing before the file is closed, and
# metrics.jsonl and the run's lock stay open (docs/semantics.md of gcsfuse).
mount_bucket() {
  local folder=$HOME/gcs/$1
  if mountpoint -q "$folder"; then return; fi
  command -v gcsfuse >/dev/null || install_gcsfuse
  mkdir -p "$folder"
  gcsfuse --implicit-dirs --rename-dir-limit=0 --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 --kernel-list-cache-ttl-secs=0 \
    --enable-streaming-writes=false "$1" "$folder"
}

install_gcsfuse() { # cloud.google.com/storage/docs/cloud-storage-fuse/install
  local apt=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  local patient=(sudo apt-get -o DPkg::Lock::Timeout=600) # a new machine is updating itself
  retry curl -fsSL -o apt.key "$apt/doc/apt-key.gpg"
  echo "deb [signed-by=$key] $apt gcsfuse-$(lsb_release -c -s) main" | put gcsfuse.list
  sudo install -m 644 apt.key "$key" # apt reads it as a user of its own
  sudo install -m 644 gcsfuse.list /etc/apt/sources.list.d/gcsfuse.list
  retry "${patient[@]}" update -qq
  retry "${patient[@]}" install -qq -y gcsfuse
}

# A checkpoint is a folder that takes its name when it is whole. In a bucket with a hierarchical
# namespace that is one step; in a flat one it is a copy of every file, which can break off.
check_renames() {
  local probe
  probe=$(mktemp -d "$1/.tiue_jax_probe.XXXXXX")
  mkdir -p "$probe/a/b" && echo >"$probe/a/b/file"
  mv "$probe/a" "$probe/c" 2>/dev/null || true
  if [[ ! -e $probe/c/b/file || -e $probe/a ]]; then
    rm -rf "$probe"
    fail 2 "gs://$(basename "$1") [WORKDIR]: folders cannot be renamed in this bucket," \
      "expected one made with --enable-hierarchical-namespace (docs/launch.md)"
  fi
  rm -rf "$probe"
}

# A restart of the machine keeps the files and loses the mounts.
is_ready() {
  local bucket
  [[ -e ready ]] || return 1
  for bucket in "$@"; do mountpoint -q "$HOME/gcs/$bucket" || return 1; done
}

# ---- The run --------------------------------------------------------------------------------

BOOT=$(</proc/sys/kernel/random/boot_id)

# A number alone might be another process by now, after a restart of the machine.
is_running() {
  local process boot state
  [[ ! -e code && -e pid ]] && read -r process boot <pid && [[ $boot == "$BOOT" ]] || return 1
  { read -r _ _ state _ <"/proc/$process/stat"; } 2>/dev/null && [[ $state != [ZX] ]]
}

# gs://BUCKET/... as a path of the mount, also behind the = of a flag.
local_path() {
  if [[ $1 =~ ^(--[A-Za-z0-9_.]+=)?gs://([^/]+)(/.*)?$ ]]; then
    mountpoint -q "$HOME/gcs/${BASH_REMATCH[2]}" || fail 2 "gs://${BASH_REMATCH[2]}: is not mounted"
    printf %s "${BASH_REMATCH[1]}$HOME/gcs/${BASH_REMATCH[2]}${BASH_REMATCH[3]}"
  else
    printf %s "$1"
  fi
}

start() {
  local workdir arg args=()
  exec 9>lock && flock 9 # two starts at once are one
  if is_running; then return; fi
  workdir=$(local_path "$1" && echo .) # the dot keeps line ends at the end of a name
  args=(--config="$2" --workdir="${workdir%.}" --multihost)
  for arg in "${@:3}"; do
    arg=$(local_path "$arg" && echo .)
    args+=("${arg%.}")
  done
  rm -f code stopped
  # A session of its own, and no file of ours: it stays when the connection goes.
  setsid nohup bash "$HERE/on_worker.sh" run "${args[@]}" </dev/null >>log 2>&1 9>&- &
  echo "$! $BOOT" | put pid
}

# The wrapper that outlives the training and notes its exit code.
run() {
  local code=0
  trap : TERM INT HUP # for the training, which saves; this shell waits for it
  if [[ -e hf_token ]]; then export HF_TOKEN_PATH=$HERE/hf_token; fi # huggingface_hub reads it
  printf '== %s: training starts\n' "$(date -u +%FT%TZ)"
  cd source
  "$PYTHON" -m tiue_jax.main "$@" || code=$?
  cd "$HERE"
  printf '== %s: training ended with exit code %s\n' "$(date -u +%FT%TZ)" "$code"
  echo "$code" | put code
}

state() {
  if is_running; then
    echo "tiue-worker running"
  elif [[ -e stopped && -e code && $(<code) =~ ^(75|143)$ ]]; then
    echo "tiue-worker stopped" # by stop, so that nobody starts it again; 143: before its first step
  elif [[ -e code ]]; then
    echo "tiue-worker ended $(<code)"
  elif [[ -e pid ]]; then
    echo "tiue-worker lost" # killed, or the machine was restarted
  else
    echo "tiue-worker none"
  fi
}

# Shows what has not been shown, until the run is over. Ends early if nobody listens any more.
follow() {
  local over=no size shown
  while [[ $over == no ]]; do
    is_running || over=yes # asked before the log is read, so that its end is not missed
    size=$(stat -c %s log 2>/dev/null || echo 0)
    shown=0
    if [[ -e shown ]]; then shown=$(<shown); fi
    if ((size > shown)); then
      set +o pipefail # tail is cut off by head
      tail -c "+$((shown + 1))" log | head -c "$((size - shown))"
      set -o pipefail
      echo "$size" | put shown
    fi
    if [[ $over == no ]]; then sleep "${TIUE_FOLLOW_SECONDS:-2}"; fi
  done
}

# Its session is its process group. Group 1 would be every process that we may signal, and a number
# of another boot or of somebody else a stranger: the group must be led by our own wrapper.
signal_run() {
  local process boot line
  read -r process boot <pid
  [[ $process =~ ^[0-9]+$ && $process -gt 1 && $boot == "$BOOT" ]] || return 0
  { mapfile -d '' -t line <"/proc/$process/cmdline"; } 2>/dev/null || return 0
  [[ " ${line[*]} " == *" $HERE/on_worker.sh run "* ]] || return 0
  kill "-$1" -- "-$process" 2>/dev/null || true
}

# Waits for the end. Args: seconds. Fails if the run goes on.
await() {
  local end=$((SECONDS + $1))
  while is_running; do
    ((SECONDS < end)) || return 1
    sleep 0.2
  done
}

# How the run ended. One that goes on after SECONDS has lost its peers: it is ended, so that the
# chips are free.
settle() {
  if ! await "$1"; then
    signal_run TERM
    await "${TIUE_KILL_SECONDS:-30}" || signal_run KILL
    await 10 || fail 1 "$(hostname): the training cannot be ended"
  fi
  state
}

# Signals once, however often it is asked: a second signal would tell the training not to save.
stop() {
  if is_running; then
    if (set -C && : >stopped) 2>/dev/null; then signal_run TERM; fi
    await "$1" || fail 1 "$(hostname): still saving after $1 s"
  fi
  state
}

status() {
  local workdir latest checkpoints
  workdir=$(local_path "$1") || true # says what is wrong
  echo "training on worker 0: $(state | cut -d' ' -f2-)"
  latest=$(tail -n 1 "$workdir/metrics.jsonl" 2>/dev/null | grep -oE '"step": [0-9]+' || echo none)
  checkpoints=$(find "$workdir/checkpoints" -maxdepth 1 -type d -printf '%f\n' 2>/dev/null || true)
  checkpoints=$(grep -xE '[0-9]+' <<<"$checkpoints" | sort -n | tail -n 1 || true)
  echo "latest step logged: ${latest##* }, newest checkpoint: ${checkpoints:-none}"
  tail -n "$2" log 2>/dev/null || true
}

case ${1:-} in
  setup | start | run | state | follow | settle | stop | status) "$@" ;;
  ready) is_ready "${@:2}" ;;
  *) fail 2 "[${1:-}]: no such action" ;;
esac
