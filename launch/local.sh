#!/usr/bin/env bash
# Trains on this machine, in one process or in several that work as one job:
#
#   launch/local.sh --config configs/quickstart.py [--workdir DIR] [--config.x.y=value ...]
#
#   PROCESSES=2   so many processes, joined over the loopback address; 1 by default
#   DEVICES=4     as how many devices JAX sees the CPU in each process
#   GPUS=1        so many GPUs for each process; all of them for every process by default
#   PORT=...      of process 0, where the others find it; a free one by default
#   GRACE=300     seconds that the other processes have to end by themselves, once one has stopped; 20 at most, if it has failed
#   PYTHON=...    the interpreter: .venv/bin/python by default, or python3 where there is none
#   DRY_RUN=1     print the commands only
#
# The same command again goes on where it was stopped. SIGTERM and SIGINT are passed on to every process. Exit codes:
# 0 done; 2 bad input, do not start it again; 143 (SIGTERM) and 130 (SIGINT) stopped and saved; any other, a failure:
# that of the first process which failed.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

: "${PROCESSES:=1}" "${GRACE:=300}"
stop_signal="" # the number of the signal that this script was sent
result=0
force_at="" # when what still runs is killed, in seconds since the start of the script
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

trainer() { # INDEX ARGUMENTS...: sets `command`
  local devices=()
  [[ -z "${DEVICES:-}" ]] || devices+=(JAX_NUM_CPU_DEVICES="$DEVICES")
  [[ -z "${GPUS:-}" ]] || devices+=(CUDA_VISIBLE_DEVICES="$(seq -s, "$(($1 * GPUS))" "$((($1 + 1) * GPUS - 1))")")
  command=(env "${devices[@]}" "$python" -m jaxpeft.train "${@:2}")
}

pass_on() { # NUMBER
  # Bash starts what runs beside it with SIGINT ignored: what is passed on is SIGTERM, whichever came.
  stop_signal="$1"
  kill -TERM "${pids[@]}" 2> /dev/null || true
}

set_force() { # SECONDS: never later than it was
  local at=$((SECONDS + $1))
  if [[ -z "$force_at" || "$at" -lt "$force_at" ]]; then
    force_at="$at"
  fi
}

# A failure goes before a stop, and bad input before both. Nobody is sent a signal: whoever stops saves together with the others,
# and a second SIGTERM would end it in the middle of that; after a failure the trainers end each other.
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
      # What was killed for not ending is no cause.
      [[ -z "$force_at" || "$SECONDS" -lt "$force_at" ]] || return 0
      if ((code == 2 || result == 0 || result == 130 || result == 143)); then
        result="$code"
      fi
      shorter=$((GRACE < 20 ? GRACE : 20))
      ((${#pids[@]} == 0)) || printf 'local.sh: process %s of %s ended with code %s; the others have %s s to end\n' \
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
    wait $! || true # unlike a sleep in the foreground, this ends when a signal comes
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
    : "${PORT:=PORT}" # which is looked for when it is needed
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

# One process takes the place of this script: signals and the exit code are its own.
trainer 0 "$@"
dry || exec "${command[@]}"
run "${command[@]}"
