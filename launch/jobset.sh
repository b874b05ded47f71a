#!/usr/bin/env bash
# Train on Kubernetes with JobSet: fill in launch/tpu_jobset.yaml or launch/gpu_jobset.yaml and
# apply it.
#
#   NAME=llama IMAGE=... TOPOLOGY=4x4 launch/jobset.sh tpu --config configs/llama3_8b_lora.py
#   NAME=llama IMAGE=... NODES=2 launch/jobset.sh gpu --config configs/llama3_8b_lora.py
#
#   NAME          name of the job: a-z, 0-9 and -, at most 28 characters
#   IMAGE         image built from launch/Dockerfile, with a tag other than latest
#   CLAIM=runs    PersistentVolumeClaim, ReadWriteMany, mounted at /runs, which has the run's folder
#   NAMESPACE     kubectl's current namespace by default
#   tpu:  ACCELERATOR=tpu-v5-lite-podslice   GKE's name of the accelerator
#         TOPOLOGY                           topology of a slice, such as 4x4 or 2x2x4
#         SLICES=1, CHIPS=4                  number of slices, chips per host
#   gpu:  ACCELERATOR=nvidia-h100-80gb       GKE's name of the accelerator
#         NODES=1, GPUS=8                    number of nodes, GPUs per node
#   DRY_RUN=1     only print the manifest
#
# The run's folder is /runs/NAME, unless you pass --workdir. Run the same command again to resume:
# it first deletes a finished job of that name, and leaves a running one alone.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

count_hosts() { # set HOSTS from TOPOLOGY and CHIPS
  local chips=1 side
  for side in ${TOPOLOGY//x/ }; do
    chips=$((chips * side))
  done
  if ((chips % CHIPS != 0)); then
    problems+=("TOPOLOGY=$TOPOLOGY: has $chips chips, not a multiple of CHIPS=$CHIPS per host")
  fi
  # shellcheck disable=SC2034 # fill_in reads it by name
  HOSTS=$((chips / CHIPS))
}

quoted() { # ARGUMENTS...: as a JSON list, which is also valid YAML
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
    require CHIPS '[1248]' '1, 2, 4 or 8 chips per host'
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
    printf 'jobset.sh: %s: is not tpu or gpu; see the comment at the top of launch/jobset.sh\n' "${kind:-no argument}" >&2
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
has_flag workdir "$@" || set -- "$@" --workdir="/runs/$NAME"
# shellcheck disable=SC2034 # fill_in reads it by name
ARGS="$(quoted "$@")"

# Fill in ARGS last, so that braces in an argument are left alone.
manifest="$(fill_in "$here/${kind}_jobset.yaml" NAME IMAGE CLAIM ACCELERATOR "${fields[@]}" ARGS)"
if dry; then
  printf '%s\n' "$manifest"
  exit 0
fi
kubectl=(kubectl)
[[ -z "${NAMESPACE:-}" ]] || kubectl+=(--namespace="$NAMESPACE")
ended="$("${kubectl[@]}" get jobset "$NAME" --ignore-not-found --output='jsonpath={.status.terminalState}')"
if [[ -n "$ended" ]]; then
  # In the foreground: the new Pods must not start before the old ones end.
  "${kubectl[@]}" delete jobset "$NAME" --cascade=foreground --wait=true
fi
"${kubectl[@]}" apply --filename=- <<< "$manifest"
