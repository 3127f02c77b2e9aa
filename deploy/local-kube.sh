#!/usr/bin/env bash
# Starts a real kube-apiserver on a running store:
#   make run                  in one terminal
#   deploy/local-kube.sh      in another; then use the kubectl line that it prints
# Options: --store URL  --dir DIRECTORY  --port PORT  [-- KUBE-APISERVER FLAGS]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
"$root/tests/kube/build"
exec "$root/tests/kube/bin/local-kube" --dir "$root/data/kube" "$@"
