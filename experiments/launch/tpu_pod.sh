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
#         missing). Run it again after a change: what it once put there and is no more, goes.
# run     starts experiments/train.py with the flags after "--" on every worker and returns. The
#         same command goes on after `stop` or a maintenance. A slice that was preempted is gone:
#         delete it, create it again, and `setup` it first.
# status  says of every worker whether it trains, and its last line.
# logs    follows what the first worker prints; Ctrl-C leaves the training alone.
# stop    lets the run save its state and end.
#
# NAME is a slice that exists, as `gcloud compute tpus tpu-vm create NAME --zone=ZONE
# --accelerator-type=v5litepod-32 --version=v2-alpha-tpuv5-lite` makes it. --workdir and the data
# lie on a disk that all workers see, such as Filestore. Other options before "--" are gcloud's;
# --dry prints the commands instead of running them, --help this.
set -euo pipefail

usage() {
  echo "error: $1; usage: tpu_pod.sh setup|run|status|logs|stop NAME [--zone=ZONE] [--dry] [-- FLAGS OF train.py]" >&2
  exit 2
}

action=${1:-}
name=${2:-}
case $action in
  setup | run | status | logs | stop) ;;
  help | -h | --help)
    sed -n '1d; s/^# \{0,1\}//p; /^set /q' "$0"
    exit
    ;;
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
    *) usage "unexpected '$1' (options are words with '=', as --zone=$1)" ;;
  esac
  shift
done
[[ ${1:-} != -- ]] || shift
for word; do
  case $word in
    --overwrite* | -overwrite*) usage "$word, with which the same command would begin anew instead of going on: remove the run first" ;;
  esac
done
[[ $action == run || $# -eq 0 ]] || usage "'$action' takes no flags of train.py"
[[ $action != run || $# -gt 0 ]] || usage "'run' needs the flags of train.py after '--'"

quote="'"
escaped="'\\''"
quoted() { # the words as a shell takes them
  for word; do
    case $word in # by variables, which every bash, macOS's 3.2 too, reads alike
      "" | *[!A-Za-z0-9_./:=,@%+-]*) printf "'%s' " "${word//$quote/$escaped}" ;;
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
  call gcloud compute tpus tpu-vm ssh "$name" ${options[@]+"${options[@]}"} --worker="$1" --command="$2"
}

# After a restart of the machine another program may have that number.
alive='grep -qs train.py "/proc/$(cat train.pid 2>/dev/null || echo none)/cmdline"'
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
    call gcloud compute tpus tpu-vm scp "$archive" "$name:policymix.tar.gz" ${options[@]+"${options[@]}"} --worker=all
    on all "set -e
$python -c 'import ensurepip' 2>/dev/null && command -v make >/dev/null || { sudo apt-get -qq update; sudo apt-get -qq install -y make $python-venv; }
mkdir -p policymix
cd policymix
# What was deleted since could still be imported; what is not ours stays.
[ ! -e .setup ] || xargs -r -d '\\n' rm -f -- <.setup
tar -tzf ../policymix.tar.gz --quoting-style=literal >.setup
tar -xzf ../policymix.tar.gz
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
if $alive; then state=trains; elif [ -e train.log ]; then state=ended; else state='no run yet'; fi
echo \"\$(hostname): \$state; \$(tail -n 1 train.log 2>/dev/null)\""
    ;;
  logs) on 0 "tail -n 100 -F policymix/train.log" ;;
  stop)
    on all "cd policymix || exit
if $alive; then kill -TERM \"\$(cat train.pid)\"; fi
while $alive; do sleep 0.2; done
[ ! -e train.log ] || tail -n 1 train.log"
    ;;
esac
