#!/usr/bin/env bash
# Train on a cluster that was created with xpk:
#
#   NAME=llama IMAGE=... CLUSTER=... TYPE=v5litepod-16 \
#     launch/xpk.sh --config configs/llama3_8b_lora.py
#
#   NAME          name of the workload: a-z, 0-9 and -, at most 28 characters
#   IMAGE         image built from launch/Dockerfile, with a tag other than latest
#   CLUSTER       name of the cluster
#   TYPE          TPU type such as v5litepod-16 or v6e-64, or GPU type such as h100-mega-80gb-8
#   COUNT=1       number of TPU slices or GPU nodes
#   STORAGE=runs  storage that xpk mounts at /runs, which has the run's folder
#   PROJECT, ZONE, PRIORITY   xpk's defaults if not set
#   SPOT=1        use spot machines; on-demand machines by default
#   MAX_RESTARTS=50
#   DRY_RUN=1     only print the commands
#
# The run's folder is /runs/NAME, unless you pass --workdir. Run the same command again to resume:
# it first deletes a finished workload of that name, and leaves a running one alone. xpk restarts a
# workload only on exit codes 127 to 255 and, as set here, 1. Exit code 2, bad input, ends it.
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

has_flag workdir "$@" || set -- "$@" --workdir="/runs/$NAME"
# xpk runs the command in a shell and sends SIGTERM to that shell: with exec, the trainer gets it.
command="exec python -m jaxpeft.train$(printf ' %q' "$@")"

# The first column of xpk's table is the name.
if ! dry && xpk workload list "${where[@]}" --filter-by-job="^$NAME\$" --filter-by-status=FINISHED |
  awk -v name="$NAME" '$1 == name { found = 1 } END { exit !found }'; then
  xpk workload delete "${where[@]}" --workload="$NAME" --force
fi
run xpk workload create "${where[@]}" --workload="$NAME" "${machines[@]}" \
  --docker-image="$IMAGE" --storage="$STORAGE" \
  --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=1 --termination-grace-period-seconds=300 \
  --command="$command"
