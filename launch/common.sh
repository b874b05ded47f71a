#!/usr/bin/env bash
# What the scripts beside it share, which source it: checks of what they are given, all problems at once, and DRY_RUN.
# tpu_host.sh and slurm.sbatch stand by themselves: they run as copies, elsewhere.
set -euo pipefail

problems=()

require() { # VARIABLE PATTERN WHAT
  if [[ ! "${!1:-}" =~ ^($2)$ ]]; then
    problems+=("$1=${!1:-}: is not $3")
  fi
}

optional() { # VARIABLE PATTERN WHAT: as require, where it is set
  [[ -z "${!1:-}" ]] || require "$@"
}

require_name() { # 28 characters, since machines and Pods put more behind it
  require NAME '[a-z]([-a-z0-9]{0,26}[a-z0-9])?' '1 to 28 characters a-z, 0-9 and -, beginning with a letter'
}

require_image() {
  require IMAGE '[a-z0-9][a-zA-Z0-9._/-]*(:[0-9]+/[a-zA-Z0-9._/-]+)?[:@][a-zA-Z0-9._:-]+' 'an image with a tag'
  [[ "${IMAGE:-}" != *:latest ]] || problems+=("IMAGE=$IMAGE: latest is not the same image after a restart; give a tag that stays")
}

given() { # FLAG ARGUMENTS...: whether the flag is one of the arguments
  local word
  for word in "${@:2}"; do
    [[ ! "$word" =~ ^--?$1(=|$) ]] || return 0
  done
  return 1
}

require_arguments() { # ARGUMENTS...: of a trainer whose folder is on a store at /runs
  given config "$@" || problems+=("--config: is not given; try --config configs/llama3_8b_lora.py")
  # A folder runs/NAME would be in the container, and go with it.
  ! given name "$@" || problems+=("--name: would not be on the store; leave it out, for /runs and NAME, or give --workdir")
}

stop_on_problems() {
  ((${#problems[@]} > 0)) || return 0
  printf "${0##*/}: %s\n" "${problems[@]}" >&2
  exit 2
}

dry() {
  [[ "${DRY_RUN:-0}" == 1 ]]
}

run() { # COMMAND...: or, on a dry run, prints it
  if dry; then
    printf '%q ' "$@" | sed 's/ $//'
    printf '\n'
  else
    "$@"
  fi
}

optional DRY_RUN '[01]' '0 or 1'
