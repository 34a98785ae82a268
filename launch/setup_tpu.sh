#!/usr/bin/env bash
# Makes every worker of the TPU ready to train: code, Python, packages, buckets, the hub's token.
#
#   launch/setup_tpu.sh [--dry-run] [--keep-source] [SETTINGS] [-- ARGS of the training]
#
#   launch/setup_tpu.sh                                after launch/create_tpu.sh
#
# The code is REPO at BRANCH or, without REPO, this checkout: the files that git tracks, as they are
# now (`git add` new ones). It is packed once; --keep-source takes the package of the last time, so
# that train_pod.sh goes on after a preemption with the code it began with. The package goes with
# the TPU (delete_tpu.sh).
# Buckets of gs:// addresses in WORKDIR and ARGs are mounted at ~/gcs/BUCKET with gcsfuse.
# The file HF_TOKEN_FILE is copied, mode 600, with scp: a token is on no command line and in no log.
#
# Run it again after a change of the code; it refuses while a training runs on the worker.
#
# Exit code: 0 ready; 2 the settings are wrong; else that of gcloud or of the worker that failed.

# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
parse_options "keep-source" "$@"

ROOT=$(dirname "$LAUNCH")

# The tracked files that are there, in their working state.
pack() {
  local file=${CONFIG%%:*}
  git -C "$ROOT" ls-files --error-unmatch -- "$file" >/dev/null 2>&1 ||
    fail 2 "$SETTINGS [CONFIG]: git does not track it, so it would not be copied, found '$file'"
  mkdir -p "$(dirname "$PACKAGE")"
  git -C "$ROOT" ls-files -z | (cd "$ROOT" && while IFS= read -r -d '' file; do
    if [[ -e $file || -L $file ]]; then printf '%s\0' "$file"; fi
  done) | tar -C "$ROOT" --null --no-recursion -T - -czf "$PACKAGE.new"
  mv "$PACKAGE.new" "$PACKAGE"
}

copy() { run gcloud compute tpus tpu-vm scp "$1" "$NAME:$REMOTE/$2" "${PLACE[@]}" --worker=all; }

# A node that has just come up may not let us in yet. 255 is ssh's own failure.
patiently() {
  local code tries
  for tries in 1 2 3; do
    code=0
    "$@" || code=$?
    ((code == 255 && tries < 3)) || return "$code"
    say "no connection; trying again in $RETRY_SECONDS s"
    sleep "$RETRY_SECONDS"
  done
}

if [[ $DRY_RUN == yes ]]; then
  if [[ -z $REPO ]]; then echo "# the files that git tracks are packed into $PACKAGE"; fi
elif [[ -n $REPO ]]; then
  : # the workers clone it
elif [[ -f $PACKAGE && ${FLAG[keep-source]:-no} == yes ]]; then
  say "$NAME: the code is that of $(date -r "$PACKAGE" '+%F %T'); setup_tpu.sh alone packs it anew"
else
  pack
fi
patiently remote_shell all "mkdir -p $REMOTE && chmod 700 $REMOTE"
copy "$LAUNCH/on_worker.sh" on_worker.sh
if [[ -z $REPO ]]; then copy "$PACKAGE" source.tgz; fi
if [[ -n $HF_TOKEN_FILE ]]; then copy "$HF_TOKEN_FILE" hf_token; fi
on_workers all setup "$REPO" "$BRANCH" "$WORKDIR_BUCKET" ${BUCKETS[@]+"${BUCKETS[@]}"}
if [[ $DRY_RUN == no ]]; then say "$NAME: every worker is ready"; fi
