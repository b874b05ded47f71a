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
#   keep ARGS...   create, setup and run as needed, until the run has ended; its exit code is that of the run. How an
#                  earlier one ended does not matter: it starts, and a run that was done already ends at once
#
#   TYPE            accelerator type; RUNTIME: the TPU software version, tpu-ubuntu2204-base by default
#   STORE           gs://BUCKET (best with a hierarchical namespace) or HOST:/PATH of an NFS server
#   SLICES=1        so many of them, joined over the data center's network
#   SPOT=1          machines that can be taken away, the default; SPOT=0 for others
#   PROJECT         as gcloud has it by default
#   EVERY=60        seconds between two looks of `keep`
#   DRY_RUN=1       print the commands only
#
# The folder of the run is /runs/NAME, unless --workdir is given. The same command again goes on where the run was stopped.
# Exit codes: 0 done, 2 bad input (here or of the run), 1 anything else.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

say() {
  printf 'tpu_vm.sh: %s\n' "$1" >&2
}

usage() {
  sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

nodes() { # the names of the slices, one a line
  local index
  if ((SLICES == 1)); then
    printf '%s\n' "$NAME"
    return
  fi
  for ((index = 0; index < SLICES; index++)); do
    printf '%s-%s\n' "$NAME" "$index"
  done
}

create() {
  local options=(--accelerator-type="$TYPE" --runtime-version="$RUNTIME")
  if ((SLICES == 1)); then
    options+=(--node-id="$NAME")
  else
    options+=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  [[ "$SPOT" == 0 ]] || options+=(--spot)
  run gcloud compute tpus queued-resources create "$NAME" "${where[@]}" "${options[@]}"
}

on_hosts() { # COMMAND: runs it on every host of every slice
  local node
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command="$1" || return
  done
}

setup() {
  local node
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm scp "$here/tpu_host.sh" "$node:jaxpeft_host.sh" "${where[@]}" --worker=all || return
  done
  on_hosts "bash jaxpeft_host.sh setup$(printf ' %q' "$IMAGE" "$STORE")"
}

command_of() { # ARGUMENTS...: the image and the arguments, as words of a command
  given workdir "$@" || set -- "$@" --workdir="/runs/$NAME"
  printf ' %q' "$IMAGE" "$@"
}

start() { # ARGUMENTS...
  on_hosts "bash jaxpeft_host.sh run$(command_of "$@")"
}

state() { # the state of the request, NONE where there is none
  local said errors
  errors="$(mktemp)" # apart: gcloud warns there when nothing is wrong, too
  if said="$(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' 2> "$errors")"; then
    printf '%s' "$said"
  elif grep -q NOT_FOUND "$errors"; then
    printf 'NONE'
  else
    cat "$errors" >&2
    printf 'UNKNOWN'
  fi
  rm -f "$errors"
}

status() {
  if dry; then
    run gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)'
  else
    printf '%s: %s\n' "$NAME" "$(state)"
  fi
  on_hosts 'bash jaxpeft_host.sh status'
}

trainer() { # ARGUMENTS...: what their trainer is at on all hosts together: none, runs, done, stopped, failed CODE, other or unknown
  local said
  # A host that has not been set up has no jaxpeft_host.sh.
  said="$(on_hosts "bash jaxpeft_host.sh status$(command_of "$@") 2> /dev/null || echo jaxpeft: none" 2> /dev/null)" ||
    said="jaxpeft: unknown"
  case "$said"$'\n' in
    *"jaxpeft: unknown"*) printf 'unknown' ;;
    *"jaxpeft: other"*) printf 'other' ;;
    *"jaxpeft: failed 2"$'\n'*) printf 'failed 2' ;;
    *"jaxpeft: none"* | $'\n') printf 'none' ;;
    *"jaxpeft: runs"*) printf 'runs' ;;
    *"jaxpeft: failed"*) grep -o -m1 'failed [0-9]*' <<< "$said" ;;
    *"jaxpeft: stopped"*) printf 'stopped' ;;
    *"jaxpeft: done"*) printf 'done' ;;
    *) printf 'unknown' ;;
  esac
}

start_all() { # ARGUMENTS...
  # A host may go away at any moment: then the next look sees it.
  started=half
  if setup && start "$@"; then
    started=yes
  else
    say "not every host could be set up; once more"
  fi
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
      now="$(trainer "$@")"
      # What a host has ended with counts only once this call has started it: before, it is how an earlier one ended.
      case "$started $now" in
        *" unknown" | "yes runs") ;;
        *" other")
          say "another command is running there; stop it first: launch/tpu_vm.sh stop"
          return 2
          ;;
        "no runs") started=yes ;;
        "yes done") return 0 ;;
        "yes failed 2")
          say "the run was refused: bad input; why: launch/tpu_vm.sh logs"
          return 2
          ;;
        "yes failed"*)
          say "the run has $now, and so have its restarts; why: launch/tpu_vm.sh logs"
          return 1
          ;;
        *) start_all "$@" ;;
      esac
      ;;
    UNKNOWN | ACCEPTED | PROVISIONING | CREATING | WAITING_FOR_RESOURCES | SUSPENDING | DELETING) ;;
    "$told") ;;
    *)
      told="$now"
      say "the request is in a state that is not known here, \"$now\"; waiting for another"
      ;;
  esac
  return 100
}

keep() { # ARGUMENTS...
  local code started=no told=none
  if dry; then
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
    sleep "$EVERY"
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
verb="$1"
shift
: "${SLICES:=1}" "${SPOT:=1}" "${EVERY:=60}" "${RUNTIME:=tpu-ubuntu2204-base}"
require_name
require ZONE '[a-z0-9-]+' 'a zone such as us-west4-a'
require SLICES '[1-9][0-9]{0,3}' 'a count'
require SPOT '[01]' '0 or 1'
require EVERY '0|[1-9][0-9]{0,4}' 'a number of seconds'
case "$verb" in # each line that fits
  create | keep) require TYPE '[a-zA-Z0-9-]+' 'an accelerator type such as v5litepod-16' ;;&
  setup | run | keep) require_image ;;&
  setup | keep) require STORE 'gs://[^ ]+|[^/: ]+:/([^/ ][^ ]*)?' 'gs://BUCKET or HOST:/PATH' ;;&
  run | keep) require_arguments "$@" ;;&
  create | setup | run | status | logs | stop | delete | keep) ;;
  *) problems+=("$verb: is none of create, setup, run, status, logs, stop, delete, keep") ;;
esac
stop_on_problems
where=(--zone="$ZONE")
[[ -z "${PROJECT:-}" ]] || where+=(--project="$PROJECT")

case "$verb" in
  create | setup | status | delete | keep) "$verb" "$@" ;;
  run) start "$@" ;;
  logs) on_hosts 'bash jaxpeft_host.sh logs' ;;
  stop) on_hosts 'bash jaxpeft_host.sh stop' ;;
esac
