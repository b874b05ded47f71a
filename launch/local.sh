#!/usr/bin/env bash
# Train on this machine, in one process, or in several processes that form one job:
#
#   launch/local.sh --config configs/quickstart.py [--workdir DIR] [--config.x.y=value ...]
#
#   PROCESSES=2   number of processes, connected over the loopback address; 1 by default
#   DEVICES=4     number of CPU devices that JAX simulates in each process
#   GPUS=1        number of GPUs for each process; by default every process sees all GPUs
#   PORT=...      coordinator port of process 0; a free port by default
#   GRACE=300     seconds for the other processes to exit after one stops; at most 20 if it failed
#   PYTHON=...    interpreter: .venv/bin/python by default, or python3 if that does not exist
#   DRY_RUN=1     only print the commands
#
# Run the same command again to resume. The script forwards SIGTERM and SIGINT to every process.
# Exit codes: 0 done; 2 bad input, do not restart; 143 (SIGTERM) and 130 (SIGINT) stopped and saved;
# any other, the code of the first process that failed.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

: "${PROCESSES:=1}" "${GRACE:=300}"
stop_signal="" # number of the signal that this script received
result=0
force_at="" # when to kill the remaining processes, in seconds since the script started
pids=()

find_python() {
  if [[ -n "${PYTHON:-}" ]]; then
    printf '%s' "$PYTHON"
  elif [[ -x "${here%/*}/.venv/bin/python" ]]; then
    printf '%s' "${here%/*}/.venv/bin/python"
  else
    printf 'python3'
  fi
}

free_port() {
  "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

trainer() { # INDEX ARGUMENTS...: set `command`
  local devices=()
  [[ -z "${DEVICES:-}" ]] || devices+=(JAX_NUM_CPU_DEVICES="$DEVICES")
  [[ -z "${GPUS:-}" ]] || devices+=(CUDA_VISIBLE_DEVICES="$(seq -s, "$(($1 * GPUS))" "$((($1 + 1) * GPUS - 1))")")
  command=(env "${devices[@]}" "$python" -m jaxpeft.train "${@:2}")
}

pass_on() { # NUMBER
  # Bash starts background processes with SIGINT ignored, so always forward SIGTERM.
  stop_signal="$1"
  kill -TERM "${pids[@]}" 2> /dev/null || true
}

set_force() { # SECONDS: from now; never move force_at to a later time
  local at=$((SECONDS + $1))
  if [[ -z "$force_at" || "$at" -lt "$force_at" ]]; then
    force_at="$at"
  fi
}

# A failure has priority over a stop, and bad input over both. Do not signal the other processes:
# after a stop all processes save together, and a second SIGTERM would interrupt them; after a
# failure the trainers end each other.
note() { # INDEX CODE
  local index="$1" code="$2" shorter
  unset "pids[index]"
  case "$code" in
    0) ;;
    130 | 143)
      ((result != 0)) || result="$code"
      set_force "$GRACE"
      ;;
    *)
      # This script killed the process: its code is not the cause.
      [[ -z "$force_at" || "$SECONDS" -lt "$force_at" ]] || return 0
      if ((code == 2 || result == 0 || result == 130 || result == 143)); then
        result="$code"
      fi
      shorter=$((GRACE < 20 ? GRACE : 20))
      ((${#pids[@]} == 0)) || printf 'local.sh: process %s of %s exited with code %s; the other processes have %s s to exit\n' \
        "$index" "$PROCESSES" "$code" "$shorter" >&2
      set_force "$shorter"
      ;;
  esac
}

wait_for_all() {
  local index code
  while ((${#pids[@]} > 0)); do
    for index in "${!pids[@]}"; do
      kill -0 "${pids[index]}" 2> /dev/null && continue
      code=0
      wait "${pids[index]}" || code=$?
      note "$index" "$code"
    done
    if [[ -n "$force_at" && "$SECONDS" -ge "$force_at" ]]; then
      kill -KILL "${pids[@]}" 2> /dev/null || true
    fi
    sleep 0.2 &
    wait $! || true # unlike a foreground sleep, a signal interrupts this
  done
}

count='[1-9][0-9]{0,3}'
require PROCESSES "$count" 'a count from 1 to 9999'
require GRACE '0|[1-9][0-9]{0,4}' 'a number of seconds'
optional DEVICES "$count" 'a count from 1 to 9999'
optional GPUS "$count" 'a count from 1 to 9999'
optional PORT '[1-9][0-9]{0,4}' 'a port'
stop_on_problems
python="$(find_python)"

if ((PROCESSES > 1)); then
  if dry; then
    : "${PORT:=PORT}" # a real run looks for a free port
  else
    [[ -n "${PORT:-}" ]] || PORT="$(free_port)"
    trap 'pass_on 15' TERM
    trap 'pass_on 2' INT
  fi
  for ((index = 0; index < PROCESSES; index++)); do
    trainer "$index" "$@" --coordinator "127.0.0.1:$PORT" --processes "$PROCESSES" --process "$index"
    if dry; then
      run "${command[@]}"
    else
      "${command[@]}" &
      pids[index]=$!
    fi
  done
  wait_for_all
  if [[ -n "$stop_signal" && ("$result" == 130 || "$result" == 143) ]]; then
    result=$((128 + stop_signal))
  fi
  exit "$result"
fi

# A single process replaces this script: it gets the signals, and its exit code is the script's.
trainer 0 "$@"
dry || exec "${command[@]}"
run "${command[@]}"
