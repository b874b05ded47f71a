#!/usr/bin/env bash
# Train on Cloud TPU VMs without an orchestrator: request a queued resource, and run one container
# on each of its hosts, as a systemd unit (launch/tpu_host.sh).
#
#   export NAME=llama ZONE=us-west4-a TYPE=v5litepod-16 IMAGE=... STORE=gs://my-bucket
#   launch/tpu_vm.sh keep --config configs/llama3_8b_lora.py
#
#   create         request the TPUs
#   setup          on every host: mount the store at /runs, fetch the image
#   run ARGS...    on every host: start the trainer, unless it already runs the same command
#   status         print the state of the request, and of the trainer on every host
#   logs           print the last lines of the log of every host
#   stop           stop the trainer, which saves
#   delete         release the TPUs; the store stays
#   keep ARGS...   create, setup and run as needed, also after each preemption, until the run ends.
#                  Starts the run however the previous command ended; a finished run ends at once
#
#   TYPE            accelerator type
#   RUNTIME         TPU software version, tpu-ubuntu2204-base by default
#   STORE           gs://BUCKET (best with a hierarchical namespace) or HOST:/PATH of an NFS server
#   SLICES=1        number of slices, connected over the data center network
#   SPOT=1          spot machines, the default; SPOT=0 for on-demand machines
#   PROJECT         gcloud's current project by default
#   EVERY=60        seconds between two checks of `keep`
#   DRY_RUN=1       only print the commands
#
# The run's folder is /runs/NAME, unless you pass --workdir. Run the same command again to resume.
# Exit codes: 0 done, 2 bad input (of this script or of the run), 1 anything else.
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

nodes() { # print the names of the slices, one per line
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

on_hosts() { # COMMAND: run it on every host of every slice
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

command_of() { # ARGUMENTS...: print the image and the arguments, quoted for a shell
  has_flag workdir "$@" || set -- "$@" --workdir="/runs/$NAME"
  printf ' %q' "$IMAGE" "$@"
}

start() { # ARGUMENTS...
  on_hosts "bash jaxpeft_host.sh run$(command_of "$@")"
}

state() { # print the state of the request, NONE if it does not exist
  local answer errors
  errors="$(mktemp)" # separate from the answer: gcloud also writes warnings to stderr
  if answer="$(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' 2> "$errors")"; then
    printf '%s' "$answer"
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

# Print the state of the trainer across all hosts: none, runs, done, stopped, failed CODE, other or
# unknown.
trainer() { # ARGUMENTS...
  local states
  # A host that has not been set up has no jaxpeft_host.sh.
  states="$(on_hosts "bash jaxpeft_host.sh status$(command_of "$@") 2> /dev/null || echo jaxpeft: none" 2> /dev/null)" ||
    states="jaxpeft: unknown"
  case "$states"$'\n' in
    *"jaxpeft: unknown"*) printf 'unknown' ;;
    *"jaxpeft: other"*) printf 'other' ;;
    *"jaxpeft: failed 2"$'\n'*) printf 'failed 2' ;;
    *"jaxpeft: none"* | $'\n') printf 'none' ;;
    *"jaxpeft: runs"*) printf 'runs' ;;
    *"jaxpeft: failed"*) grep -o -m1 'failed [0-9]*' <<< "$states" ;;
    *"jaxpeft: stopped"*) printf 'stopped' ;;
    *"jaxpeft: done"*) printf 'done' ;;
    *) printf 'unknown' ;;
  esac
}

start_all() { # ARGUMENTS...
  # A host may disappear at any time; the next check notices it.
  started=half
  if setup && start "$@"; then
    started=yes
  else
    say "could not set up every host; trying again"
  fi
}

# Check the state once and act on it. Return 0 if the run is done, 100 to check again.
keep_once() { # ARGUMENTS...
  local current
  current="$(state)"
  case "$current" in
    NONE) create || return 1 ;;
    SUSPENDED) # the machines were preempted
      say "$NAME is SUSPENDED; requesting new machines"
      delete || return 1
      ;;
    FAILED)
      say "the request failed; for the reason, run: gcloud compute tpus queued-resources describe $NAME ${where[*]}"
      return 1
      ;;
    ACTIVE)
      current="$(trainer "$@")"
      # A final state counts only after this call has started the trainer: until then, it is the
      # state of an earlier command.
      case "$started $current" in
        *" unknown" | "yes runs") ;;
        *" other")
          say "another command is running on the hosts; stop it first: launch/tpu_vm.sh stop"
          return 2
          ;;
        "no runs") started=yes ;;
        "yes done") return 0 ;;
        "yes failed 2")
          say "the run refused its input; for the reason, run: launch/tpu_vm.sh logs"
          return 2
          ;;
        "yes failed"*)
          say "the run and its restarts ended: $current; for the reason, run: launch/tpu_vm.sh logs"
          return 1
          ;;
        *) start_all "$@" ;;
      esac
      ;;
    UNKNOWN | ACCEPTED | PROVISIONING | CREATING | WAITING_FOR_RESOURCES | SUSPENDING | DELETING) ;;
    "$unknown_state") ;;
    *)
      unknown_state="$current"
      say "unknown state of the request: \"$current\"; waiting for it to change"
      ;;
  esac
  return 100
}

keep() { # ARGUMENTS...
  local code started=no unknown_state=none
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
case "$verb" in # ;;& also checks the patterns that follow
  create | keep) require TYPE '[a-zA-Z0-9-]+' 'an accelerator type such as v5litepod-16' ;;&
  setup | run | keep) require_image ;;&
  setup | keep) require STORE 'gs://[^ ]+|[^/: ]+:/([^/ ][^ ]*)?' 'gs://BUCKET or HOST:/PATH' ;;&
  run | keep) require_arguments "$@" ;;&
  create | setup | run | status | logs | stop | delete | keep) ;;
  *) problems+=("$verb: is not one of create, setup, run, status, logs, stop, delete, keep") ;;
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
