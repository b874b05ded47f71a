#!/usr/bin/env bash
# Trains on a cluster that xpk has made:
#
#   NAME=llama IMAGE=... CLUSTER=... TYPE=v5litepod-16 launch/xpk.sh --config configs/llama3_8b_lora.py
#
#   NAME          of the workload: a-z, 0-9 and -, at most 28 characters
#   IMAGE         made from launch/Dockerfile, with a tag other than latest
#   CLUSTER       as xpk knows it
#   TYPE          a TPU such as v5litepod-16 or v6e-64, or a GPU device type such as h100-mega-80gb-8
#   COUNT=1       so many slices of TPUs, or nodes with GPUs
#   STORAGE=runs  the storage that xpk mounts at /runs, where the run's folder is
#   PROJECT, ZONE, PRIORITY   as xpk has them by default
#   SPOT=1        machines that can be taken away; others by default
#   MAX_RESTARTS=50
#   DRY_RUN=1     print the commands only
#
# The folder of the run is /runs/NAME, unless --workdir is given. The same command again goes on: a workload of that name which
# has ended is deleted first, one that runs is left alone. xpk restarts a workload on exit codes 127 to 255, here on 1 too,
# and on no other: 2, bad input, ends it.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

: "${COUNT:=1}" "${STORAGE:=runs}" "${SPOT:=0}" "${MAX_RESTARTS:=50}"
require_name
require_image
require CLUSTER '[a-z0-9-]+' 'the name of a cluster'
require TYPE '[a-z0-9-]+' 'a type such as v5litepod-16 or h100-mega-80gb-8'
require COUNT '[1-9][0-9]{0,4}' 'a count'
require SPOT '[01]' '0 or 1'
require MAX_RESTARTS '0|[1-9][0-9]{0,3}' 'a number of restarts'
require_arguments "$@"
stop_on_problems

where=(--cluster="$CLUSTER")
[[ -z "${PROJECT:-}" ]] || where+=(--project="$PROJECT")
[[ -z "${ZONE:-}" ]] || where+=(--zone="$ZONE")
if [[ "$TYPE" =~ ^(v[0-9]|tpu) ]]; then
  machines=(--tpu-type="$TYPE" --num-slices="$COUNT")
else
  machines=(--device-type="$TYPE" --num-nodes="$COUNT")
fi
[[ "$SPOT" == 0 ]] || machines+=(--spot)
[[ -z "${PRIORITY:-}" ]] || machines+=(--priority="$PRIORITY")

given workdir "$@" || set -- "$@" --workdir="/runs/$NAME"
# xpk runs the command in a shell and passes SIGTERM to that shell: exec, so that it is the trainer that gets it.
command="exec python -m jaxpeft.train$(printf ' %q' "$@")"

# The table that xpk prints has the name in its first column.
if ! dry && xpk workload list "${where[@]}" --filter-by-job="^$NAME\$" --filter-by-status=FINISHED |
  awk -v name="$NAME" '$1 == name { found = 1 } END { exit !found }'; then
  xpk workload delete "${where[@]}" --workload="$NAME" --force
fi
run xpk workload create "${where[@]}" --workload="$NAME" "${machines[@]}" \
  --docker-image="$IMAGE" --storage="$STORAGE" \
  --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=1 --termination-grace-period-seconds=300 \
  --command="$command"
