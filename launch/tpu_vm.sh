#!/usr/bin/env bash
# Trains on Cloud TPU VMs without an orchestrator: a queued resource, and on each of its hosts one container in one
# systemd unit (launch/tpu_host.sh).
#
#   export NAME=llama ZONE=us-west4-a TYPE=v5litepod-16 IMAGE=... STORE=gs://my-bucket
#   launch/tpu_vm.sh keep --config configs/llama3_8b_lora.py     all of the below, and again after each preemption
#
#   create         request the TPUs
#   setup          on every host: mount the store at /runs, fetch the image
#   run ARGS...    on every host: start the trainer; one that runs the same command already is left alone
#   status         state of the request and of the trainer on every host
#   logs           the last lines of every host
#   stop           stop the trainer: it saves
#   delete         give the TPUs back; the store stays
#   keep ARGS...   create, setup and run as needed, until the run has ended; its exit code is that of the run
#
#   TYPE            accelerator type; RUNTIME: the TPU software version, tpu-ubuntu2204-base by default
#   STORE           gs://BUCKET (best with a hierarchical namespace) or HOST:/PATH of an NFS server
#   SLICES=1        so many of them, joined over the data centre's network
#   SPOT=1          machines that can be taken away, the default; SPOT=0 for others
#   PROJECT         as gcloud has it by default
#   EVERY=60        seconds between two looks of `keep`
#   DRY_RUN=1       print the commands only
#
# The folder of the run is /runs/NAME, unless --workdir is given. The same command again goes on where the run was stopped.
# Exit codes: 0 done, 2 bad input (here or of the run), 1 anything else.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

fail() {
  printf 'tpu_vm.sh: %s\n' "$1" >&2
  exit 2
}

say() {
  printf 'tpu_vm.sh: %s\n' "$1" >&2
}

run() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "$@" | sed 's/ $//'
    printf '\n'
  else
    "$@"
  fi
}

usage() {
  sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

require() { # VARIABLE...
  local variable
  for variable in "$@"; do
    [[ -n "${!variable:-}" ]] || fail "$variable: is not set; see launch/tpu_vm.sh --help"
  done
}

nodes() { # the names of the slices, one a line
  local index
  if ((slices == 1)); then
    printf '%s\n' "$NAME"
    return
  fi
  for ((index = 0; index < slices; index++)); do
    printf '%s-%s\n' "$NAME" "$index"
  done
}

create() {
  require TYPE
  local options=(--accelerator-type="$TYPE" --runtime-version="${RUNTIME:-tpu-ubuntu2204-base}")
  if ((slices == 1)); then
    options+=(--node-id="$NAME")
  else
    options+=(--node-count="$slices" --node-prefix="$NAME")
  fi
  [[ "${SPOT:-1}" == 0 ]] || options+=(--spot)
  run gcloud compute tpus queued-resources create "$NAME" "${where[@]}" "${options[@]}"
}

on_hosts() { # COMMAND: runs it on every host of every slice
  local node
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command="$1" || return
  done
}

setup() {
  require IMAGE STORE
  local node
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm scp "$here/tpu_host.sh" "$node:jaxpeft_host.sh" "${where[@]}" --worker=all || return
  done
  on_hosts "bash jaxpeft_host.sh setup$(printf ' %q' "$IMAGE" "$STORE")"
}

require_config() { # ARGUMENTS...
  [[ " $* " == *" --config"* ]] || fail "--config: is not given; try: run --config configs/llama3_8b_lora.py"
}

start() { # ARGUMENTS...
  require IMAGE
  require_config "$@"
  [[ " $* " == *" --workdir"* ]] || set -- "$@" --workdir="/runs/$NAME"
  on_hosts "bash jaxpeft_host.sh run$(printf ' %q' "$IMAGE" "$@")"
}

state() { # the state of the request, NONE where there is none
  local said
  if said="$(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' 2>&1)"; then
    printf '%s' "$said"
  elif [[ "$said" == *NOT_FOUND* ]]; then
    printf 'NONE'
  else
    printf '%s\n' "$said" >&2
    printf 'UNKNOWN'
  fi
}

status() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    run gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)'
  else
    printf '%s: %s\n' "$NAME" "$(state)"
  fi
  on_hosts 'bash jaxpeft_host.sh status'
}

trainer() { # what the trainer is at on all hosts together: none, runs, done, stopped, failed CODE, or unknown
  local said
  # A host that has not been set up has no jaxpeft_host.sh.
  said="$(on_hosts 'bash jaxpeft_host.sh status 2> /dev/null || echo jaxpeft: none' 2> /dev/null)" || said="jaxpeft: unknown"
  case "$said" in
    *"jaxpeft: unknown"*) printf 'unknown' ;;
    *"jaxpeft: failed 2"*) printf 'failed 2' ;;
    *"jaxpeft: none"* | "") printf 'none' ;;
    *"jaxpeft: runs"*) printf 'runs' ;;
    *"jaxpeft: failed"*) grep -o -m1 'failed [0-9]*' <<< "$said" ;;
    *"jaxpeft: stopped"*) printf 'stopped' ;;
    *"jaxpeft: done"*) printf 'done' ;;
    *) printf 'unknown' ;;
  esac
}

keep_once() { # ARGUMENTS...: one look, and what follows from it; 0 if the run is done, 100 to look again
  local now
  now="$(state)"
  case "$now" in
    NONE) create || return 1 ;;
    SUSPENDED) # the machines were taken away: ask for others
      say "$NAME is SUSPENDED; a new request"
      delete || return 1
      ;;
    FAILED)
      say "the request has failed; why: gcloud compute tpus queued-resources describe $NAME ${where[*]}"
      return 1
      ;;
    ACTIVE)
      now="$(trainer)"
      case "$now" in
        done) return 0 ;;
        "failed 2")
          say "the run was refused: bad input; why: launch/tpu_vm.sh logs"
          return 2
          ;;
        failed*)
          say "the run has $now, and so have its restarts; why: launch/tpu_vm.sh logs"
          return 1
          ;;
        none | stopped)
          # A host may go away at any moment: then the next look sees it.
          if ! setup || ! start "$@"; then
            say "not every host could be set up; once more"
          fi
          ;;
      esac
      ;;
  esac
  return 100
}

keep() { # ARGUMENTS...
  local code
  require TYPE IMAGE STORE
  require_config "$@"
  if [[ -n "${DRY_RUN:-}" ]]; then
    create
    setup
    start "$@"
    status
    return
  fi
  while true; do
    code=0
    keep_once "$@" || code=$?
    ((code == 100)) || return "$code"
    sleep "${EVERY:-60}"
  done
}

delete() {
  run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

case "${1:-}" in
  -h | --help | help | "")
    usage
    exit 0
    ;;
esac
require NAME ZONE
[[ "$NAME" =~ ^[a-z]([-a-z0-9]{0,26}[a-z0-9])?$ ]] || fail "NAME=$NAME: is not 1 to 28 characters a-z, 0-9 and -, beginning with a letter"
slices="${SLICES:-1}"
[[ "$slices" =~ ^[1-9][0-9]{0,3}$ ]] || fail "SLICES=$slices: is not a count"
where=(--zone="$ZONE")
[[ -z "${PROJECT:-}" ]] || where+=(--project="$PROJECT")

verb="$1"
shift
case "$verb" in
  create | setup | status | delete | keep) "$verb" "$@" ;;
  run) start "$@" ;;
  logs) on_hosts 'bash jaxpeft_host.sh logs' ;;
  stop) on_hosts 'bash jaxpeft_host.sh stop' ;;
  *) fail "$verb: is none of create, setup, run, status, logs, stop, delete, keep" ;;
esac
