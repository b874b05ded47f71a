#!/usr/bin/env bash
# Set up a host of a TPU slice and control its trainer. launch/tpu_vm.sh copies this script to each
# host.
#
#   setup IMAGE STORE   mount the store at /runs, fetch the image
#   run IMAGE ARGS...   start the trainer in a container, as a systemd unit, which survives a reboot
#                       and the end of the connection
#   status [IMAGE ARGS...]
#                       print one line: jaxpeft: none | runs | done | stopped | failed CODE. With a
#                       command, report only that command: other if another one is running, none if
#                       another one has ended
#   logs                print the last lines of the log
#   stop                stop the trainer
#
# systemd restarts the unit when it fails, but not on exit code 2, bad input. When the host shuts
# down, as before the preemption of a spot machine, systemd sends SIGTERM: docker forwards it, and
# the run saves.
set -euo pipefail

unit=jaxpeft.service
unit_file="${UNIT_DIR:-/etc/systemd/system}/$unit"
command_file="${COMMAND_DIR:-/etc/jaxpeft}/run.sh"

fail() {
  printf 'tpu_host.sh: %s\n' "$1" >&2
  exit 2
}

install_gcsfuse() {
  command -v gcsfuse > /dev/null && return
  local keys=/usr/share/keyrings/cloud.google.asc repository
  repository="gcsfuse-$(lsb_release -c -s)"
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$keys" > /dev/null
  printf 'deb [signed-by=%s] https://packages.cloud.google.com/apt %s main\n' "$keys" "$repository" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  sudo apt-get update -q
  sudo apt-get install -y -q gcsfuse
}

mount_store() { # STORE
  local line
  sudo mkdir -p /runs
  mountpoint -q /runs && return
  case "$1" in
    gs://*)
      install_gcsfuse
      # Checkpoints are renamed into place: a bucket without a hierarchical namespace renames every
      # file separately.
      line="${1#gs://} /runs gcsfuse rw,_netdev,allow_other,implicit_dirs,rename_dir_limit=200000 0 0"
      ;;
    [!/]*:/[!/]* | [!/]*:/)
      sudo apt-get install -y -q nfs-common
      line="$1 /runs nfs rw,_netdev,hard 0 0"
      ;;
    *) fail "the store $1: is not gs://BUCKET or HOST:/PATH" ;;
  esac
  # fstab mounts the store again after a reboot, before the unit starts.
  grep -qxF "$line" "${FSTAB:-/etc/fstab}" || printf '%s\n' "$line" | sudo tee -a "${FSTAB:-/etc/fstab}" > /dev/null
  sudo mount /runs
}

setup() { # IMAGE STORE
  local registry="${1%%/*}"
  mount_store "$2"
  if [[ "$registry" == *.pkg.dev || "$registry" == *gcr.io ]]; then
    sudo gcloud auth configure-docker "$registry" --quiet
  fi
  sudo docker pull "$1"
}

# Run as root, because the TPU devices may belong to root. --init lets a signal end Python also
# before Python sets its handlers.
command_text() { # IMAGE ARGS...
  local image="$1"
  shift
  printf '#!/usr/bin/env bash\nexec docker run --rm --init --name jaxpeft --user root --privileged --network host'
  printf ' --shm-size 16g --ulimit memlock=-1 --volume /runs:/runs %q' "$image"
  printf ' %q' "$@"
  printf '\n'
}

unit_text() {
  cat << END
[Unit]
Description=jaxpeft trainer
Requires=docker.service
After=docker.service network-online.target remote-fs.target
Wants=network-online.target
RequiresMountsFor=/runs
StartLimitIntervalSec=86400
StartLimitBurst=50

[Service]
Type=exec
ExecStartPre=-/usr/bin/docker rm --force jaxpeft
ExecStart=/bin/bash $command_file
Restart=on-failure
RestartPreventExitStatus=2
RestartSec=10
KillMode=mixed
TimeoutStopSec=300

[Install]
WantedBy=multi-user.target
END
}

property() { # NAME
  systemctl show "$unit" --property="$1" --value
}

state() {
  if [[ "$(property LoadState)" != loaded ]]; then
    printf 'none'
    return
  fi
  case "$(property ActiveState)" in
    active | activating | deactivating | reloading)
      printf 'runs'
      return
      ;;
  esac
  local code
  code="$(property ExecMainStatus)"
  case "$(property ExecMainCode)" in # the si_code of waitid
    1) ;;                            # exited
    2 | 3) code=$((128 + code)) ;;   # killed; the status is the signal
    *) # Not started since boot, so code 0 means nothing. During boot, systemd queues the unit.
      [[ "$(property Job)" =~ ^0?$ ]] && printf 'none' || printf 'runs'
      return
      ;;
  esac
  case "$code" in
    0) printf 'done' ;;
    143) printf 'stopped' ;;
    *) printf 'failed %s' "$code" ;;
  esac
}

runs_command() { # IMAGE ARGS...: whether the unit has this command
  [[ -r "$command_file" && "$(cat "$command_file")" == "$(command_text "$@")" ]]
}

status() { # [IMAGE ARGS...]
  local unit_state
  unit_state="$(state)"
  if (($# > 0)) && ! runs_command "$@"; then
    [[ "$unit_state" == runs ]] && unit_state=other || unit_state=none
  fi
  printf 'jaxpeft: %s\n' "$unit_state"
}

start() { # IMAGE ARGS...
  if [[ "$(state)" == runs ]]; then
    runs_command "$@" || fail "another command is running; stop it first: launch/tpu_vm.sh stop"
    printf 'jaxpeft: already running\n'
    return
  fi
  sudo mkdir -p "$(dirname "$command_file")"
  command_text "$@" | sudo tee "$command_file" > /dev/null
  unit_text | sudo tee "$unit_file" > /dev/null
  sudo systemctl daemon-reload
  sudo systemctl reset-failed "$unit" 2> /dev/null || true # fails if the unit has never run
  sudo systemctl enable "$unit"
  sudo systemctl restart "$unit"
}

verb="${1:-}"
[[ -z "$verb" ]] || shift
case "$verb" in
  setup) setup "${1:?IMAGE}" "${2:?STORE}" ;;
  run) start "${1:?IMAGE}" "${@:2}" ;;
  status) status "$@" ;;
  logs) sudo journalctl --unit="$unit" --lines=200 --no-pager --output=cat ;;
  stop) sudo systemctl disable --now "$unit" ;;
  *) fail "$verb: is not one of setup, run, status, logs, stop" ;;
esac
