#!/usr/bin/env bash
# Functions that the launch scripts source: input checks, which report all problems at once, and
# DRY_RUN. tpu_host.sh and slurm.sbatch do not source this file, because they run as copies
# elsewhere.
set -euo pipefail

problems=()

require() { # VARIABLE PATTERN DESCRIPTION
  if [[ ! "${!1:-}" =~ ^($2)$ ]]; then
    problems+=("$1=${!1:-}: is not $3")
  fi
}

optional() { # VARIABLE PATTERN DESCRIPTION: like require, but the variable may be unset
  [[ -z "${!1:-}" ]] || require "$@"
}

require_name() { # at most 28 characters: machines and Pods append suffixes
  require NAME '[a-z]([-a-z0-9]{0,26}[a-z0-9])?' '1 to 28 characters a-z, 0-9 and -, beginning with a letter'
}

require_image() {
  require IMAGE '[a-z0-9][a-zA-Z0-9._/-]*(:[0-9]+/[a-zA-Z0-9._/-]+)?[:@][a-zA-Z0-9._:-]+' 'an image with a tag'
  [[ "${IMAGE:-}" != *:latest ]] || problems+=("IMAGE=$IMAGE: latest may be another image after a restart; use a fixed tag")
}

has_flag() { # FLAG ARGUMENTS...: whether the arguments contain the flag
  local word
  for word in "${@:2}"; do
    [[ ! "$word" =~ ^--?$1(=|$) ]] || return 0
  done
  return 1
}

require_arguments() { # ARGUMENTS...: those of a trainer that writes to the store at /runs
  has_flag config "$@" || problems+=("--config: is missing; try --config configs/llama3_8b_lora.py")
  # --name writes to runs/NAME inside the container, which is lost with the container.
  ! has_flag name "$@" || problems+=("--name: its folder is not on the store; remove it to use /runs/\$NAME, or pass --workdir")
}

stop_on_problems() {
  ((${#problems[@]} > 0)) || return 0
  printf "${0##*/}: %s\n" "${problems[@]}" >&2
  exit 2
}

dry() {
  [[ "${DRY_RUN:-0}" == 1 ]]
}

run() { # COMMAND...: run it, or print it in a dry run
  if dry; then
    printf '%q ' "$@" | sed 's/ $//'
    printf '\n'
  else
    "$@"
  fi
}

optional DRY_RUN '[01]' '0 or 1'
