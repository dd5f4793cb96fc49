#!/bin/bash
# Trains on all workers of a Cloud TPU pod slice, from any machine that has gcloud.
#
#   experiments/launch/tpu_pod.sh setup NAME --zone=ZONE
#   experiments/launch/tpu_pod.sh run NAME --zone=ZONE -- \
#     --config=configs/pi05_libero.py --workdir=/mnt/shared/runs/libero
#   experiments/launch/tpu_pod.sh status NAME --zone=ZONE
#   experiments/launch/tpu_pod.sh logs NAME --zone=ZONE
#   experiments/launch/tpu_pod.sh stop NAME --zone=ZONE
#
# setup   copies what git tracks in this repository, as it is here now, to every worker and installs
#         it there (PYTHON=python3.12 chooses the interpreter; 3.11 is installed where it is
#         missing). Run it again after a change.
# run     starts experiments/train.py with the flags after "--" on every worker and returns. The
#         same command goes on after `stop`, a preemption or a maintenance.
# status  says of every worker whether it trains, and its last line.
# logs    follows what the first worker prints; Ctrl-C leaves the training alone.
# stop    lets the run save its state and end.
#
# NAME is a slice that exists, as `gcloud compute tpus tpu-vm create NAME --zone=ZONE
# --accelerator-type=v5litepod-32 --version=v2-alpha-tpuv5-lite` makes it. --workdir and the data
# lie on a disk that all workers see, such as Filestore. Other options before "--" are gcloud's;
# --dry prints the commands instead of running them.
set -euo pipefail

usage() {
  echo "error: $1; usage: tpu_pod.sh setup|run|status|logs|stop NAME [--zone=ZONE] [--dry] [-- FLAGS OF train.py]" >&2
  exit 2
}

action=${1:-}
name=${2:-}
case $action in
  setup | run | status | logs | stop) ;;
  "") usage "no action" ;;
  *) usage "unknown action '$action'" ;;
esac
case $name in "" | -*) usage "no NAME of a TPU after '$action'" ;; esac
shift 2
dry=
options=()
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --dry) dry=1 ;;
    --config* | --workdir*) usage "the flags of train.py come after '--', and $1 before it" ;;
    -*) options+=("$1") ;;
    *) usage "unexpected '$1'" ;;
  esac
  shift
done
[[ ${1:-} != -- ]] || shift
[[ $action == run || $# -eq 0 ]] || usage "'$action' takes no flags of train.py"
[[ $action != run || $# -gt 0 ]] || usage "'run' needs the flags of train.py after '--'"

quoted() { # the words as a shell takes them
  for word; do
    case $word in
      "" | *[!A-Za-z0-9_./:=,@%+-]*) printf "'%s' " "${word//\'/\'\\\'\'}" ;;
      *) printf '%s ' "$word" ;;
    esac
  done
}

call() {
  if [[ $dry ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

on() { # WORKER COMMAND
  call gcloud compute tpus tpu-vm ssh "$name" "${options[@]}" --worker="$1" --command="$2"
}

alive='[ -e train.pid ] && kill -0 "$(cat train.pid)" 2>/dev/null'
case $action in
  setup)
    cd "$(dirname "$0")/../.."
    python=${PYTHON:-python3.11}
    archive=policymix.tar.gz
    if [[ ! $dry ]]; then
      folder=$(mktemp -d)
      trap 'rm -rf "$folder"' EXIT
      archive=$folder/$archive
      git ls-files -z | while IFS= read -r -d '' file; do
        [[ ! -e $file ]] || printf '%s\0' "$file"
      done | tar -czf "$archive" --null -T -
    fi
    call gcloud compute tpus tpu-vm scp "$archive" "$name:policymix.tar.gz" "${options[@]}" --worker=all
    on all "set -e
$python -c 'import ensurepip' 2>/dev/null && command -v make >/dev/null || { sudo apt-get -qq update; sudo apt-get -qq install -y make $python-venv; }
mkdir -p policymix
tar -xzf policymix.tar.gz -C policymix
cd policymix
make venv EXTRAS=tpu PYTHON=$python"
    ;;
  run)
    flags=$(quoted "$@")
    on all "cd policymix || exit
if $alive; then echo 'a run is under way: stop it first' >&2; exit 1; fi
nohup .venv/bin/python -u experiments/train.py --distributed=auto $flags >>train.log 2>&1 </dev/null &
echo \$! >train.pid"
    ;;
  status)
    on all "cd policymix || exit
if $alive; then state=trains; else state=ended; fi
echo \"\$(hostname): \$state; \$(tail -n 1 train.log)\""
    ;;
  logs) on 0 "tail -n 100 -F policymix/train.log" ;;
  stop)
    on all "cd policymix || exit
if $alive; then kill -TERM \"\$(cat train.pid)\"; fi
while $alive; do sleep 1; done
tail -n 1 train.log"
    ;;
esac
