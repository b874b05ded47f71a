#!/usr/bin/env bash
# Trains on Kubernetes with JobSet: fills in launch/tpu_jobset.yaml or launch/gpu_jobset.yaml and applies it.
#
#   NAME=llama IMAGE=... TOPOLOGY=4x4 launch/jobset.sh tpu --config configs/llama3_8b_lora.py
#   NAME=llama IMAGE=... NODES=2 launch/jobset.sh gpu --config configs/llama3_8b_lora.py
#
#   NAME          of the job: a-z, 0-9 and -, at most 28 characters
#   IMAGE         made from launch/Dockerfile, with a tag other than latest
#   CLAIM=runs    the PersistentVolumeClaim, ReadWriteMany, that is mounted at /runs: where the run's folder is
#   NAMESPACE     as kubectl has it by default
#   tpu:  ACCELERATOR=tpu-v5-lite-podslice   as GKE names it; TOPOLOGY such as 4x4 or 2x2x4, of one slice
#         SLICES=1, CHIPS=4 of one host
#   gpu:  ACCELERATOR=nvidia-h100-80gb, NODES=1, GPUS=8 of one node
#   DRY_RUN=1     print the manifest only
#
# The folder of the run is /runs/NAME, unless --workdir is given. The same command again goes on: a job of that name which has
# ended is deleted first, one that runs is left alone.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

count_hosts() { # sets HOSTS from TOPOLOGY and CHIPS
  local chips=1 side
  for side in ${TOPOLOGY//x/ }; do
    chips=$((chips * side))
  done
  if ((chips % CHIPS != 0)); then
    problems+=("TOPOLOGY=$TOPOLOGY: has $chips chips, which hosts of CHIPS=$CHIPS do not divide")
  fi
  # shellcheck disable=SC2034 # fill_in reads it by its name
  HOSTS=$((chips / CHIPS))
}

quoted() { # ARGUMENTS...: as a JSON list, which is YAML too
  local word list=()
  for word in "$@"; do
    word="${word//\\/\\\\}"
    list+=("\"${word//\"/\\\"}\"")
  done
  local IFS=,
  printf '[%s]' "${list[*]}"
}

fill_in() { # FILE VARIABLE...
  local text variable
  text="$(cat "$1")"
  for variable in "${@:2}"; do
    text=${text//"\${$variable}"/"${!variable}"}
  done
  printf '%s\n' "$text"
}

kind="${1:-}"
case "$kind" in
  tpu)
    : "${ACCELERATOR:=tpu-v5-lite-podslice}" "${SLICES:=1}" "${CHIPS:=4}"
    require TOPOLOGY '[1-9][0-9]?x[1-9][0-9]?(x[1-9][0-9]?)?' 'a topology such as 4x4 or 2x2x4'
    require CHIPS '[1248]' '1, 2, 4 or 8 chips of a host'
    ((${#problems[@]} > 0)) || count_hosts
    require SLICES '[1-9][0-9]{0,3}' 'a count'
    fields=(SLICES HOSTS CHIPS TOPOLOGY)
    ;;
  gpu)
    : "${ACCELERATOR:=nvidia-h100-80gb}" "${NODES:=1}" "${GPUS:=8}"
    require NODES '[1-9][0-9]{0,3}' 'a count'
    require GPUS '[1-9][0-9]?' 'a count'
    fields=(NODES GPUS)
    ;;
  *)
    printf 'jobset.sh: %s: is neither tpu nor gpu; see the head of this file\n' "${kind:-no argument}" >&2
    exit 2
    ;;
esac
shift
: "${CLAIM:=runs}"
require_name
require_image
require ACCELERATOR '[a-z0-9-]+' 'the name of an accelerator'
require CLAIM '[a-z0-9.-]+' 'the name of a claim'
require_arguments "$@"
[[ "$*" != *$'\n'* ]] || problems+=("an argument has more than one line")
stop_on_problems
given workdir "$@" || set -- "$@" --workdir="/runs/$NAME"
# shellcheck disable=SC2034 # fill_in reads it by its name
ARGS="$(quoted "$@")"

# ARGS last: what stands in braces in an argument is the argument's own.
manifest="$(fill_in "$here/${kind}_jobset.yaml" NAME IMAGE CLAIM ACCELERATOR "${fields[@]}" ARGS)"
if dry; then
  printf '%s\n' "$manifest"
  exit 0
fi
kubectl=(kubectl)
[[ -z "${NAMESPACE:-}" ]] || kubectl+=(--namespace="$NAMESPACE")
ended="$("${kubectl[@]}" get jobset "$NAME" --ignore-not-found --output='jsonpath={.status.terminalState}')"
if [[ -n "$ended" ]]; then
  # In the foreground: the new Pods must not start before the old ones have ended.
  "${kubectl[@]}" delete jobset "$NAME" --cascade=foreground --wait=true
fi
"${kubectl[@]}" apply --filename=- <<< "$manifest"
