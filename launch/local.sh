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
#
# The same command again goes on where it was stopped. SIGTERM and SIGINT are passed on to every process. Exit codes:
# 0 done; 2 bad input, do not start it again; 143 (SIGTERM) and 130 (SIGINT) stopped and saved; any other, a failure:
# that of the first process which failed.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
processes="${PROCESSES:-1}"
grace="${GRACE:-300}"
stop_signal="" # the number of the signal that this script was sent
result=0
force_at="" # when what still runs is killed, in seconds since the start of the script
pids=()

fail() {
  printf 'local.sh: %s\n' "$1" >&2
  exit 2
}

require_count() { # NAME VALUE
  [[ "$2" =~ ^[1-9][0-9]{0,3}$ ]] || fail "$1=$2: is not a count from 1 to 9999"
}

find_python() {
  if [[ -n "${PYTHON:-}" ]]; then
    printf '%s' "$PYTHON"
  elif [[ -x "$root/.venv/bin/python" ]]; then
    printf '%s' "$root/.venv/bin/python"
  else
    printf 'python3'
  fi
}

free_port() {
  "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start() { # INDEX PORT ARGUMENTS...
  local index="$1" port="$2" first
  shift 2
  if [[ -n "${GPUS:-}" ]]; then
    first=$((index * GPUS))
    export CUDA_VISIBLE_DEVICES
    CUDA_VISIBLE_DEVICES="$(seq -s, "$first" "$((first + GPUS - 1))")"
  fi
  "$python" -m jaxpeft.train "$@" --coordinator "127.0.0.1:$port" --processes "$processes" --process "$index" &
  pids[index]=$!
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
      set_force "$grace"
      ;;
    *)
      # What was killed for not ending is no cause.
      [[ -z "$force_at" || "$SECONDS" -lt "$force_at" ]] || return 0
      if ((code == 2 || result == 0 || result == 130 || result == 143)); then
        result="$code"
      fi
      shorter=$((grace < 20 ? grace : 20))
      ((${#pids[@]} == 0)) || printf 'local.sh: process %s of %s ended with code %s; the others have %s s to end\n' \
        "$index" "$processes" "$code" "$shorter" >&2
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

require_count PROCESSES "$processes"
[[ "$grace" =~ ^[0-9]{1,5}$ ]] || fail "GRACE=$grace: is not a number of seconds"
[[ -z "${DEVICES:-}" ]] || require_count DEVICES "$DEVICES"
[[ -z "${GPUS:-}" ]] || require_count GPUS "$GPUS"
python="$(find_python)"
[[ -z "${DEVICES:-}" ]] || export JAX_NUM_CPU_DEVICES="$DEVICES"

if ((processes > 1)); then
  trap 'pass_on 15' TERM
  trap 'pass_on 2' INT
  port="${PORT:-$(free_port)}"
  for ((index = 0; index < processes; index++)); do
    start "$index" "$port" "$@"
  done
  wait_for_all
  if [[ -n "$stop_signal" && ("$result" == 130 || "$result" == 143) ]]; then
    result=$((128 + stop_signal))
  fi
  exit "$result"
fi

# One process takes the place of this script: signals and the exit code are its own.
exec "$python" -m jaxpeft.train "$@"
