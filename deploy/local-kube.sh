#!/usr/bin/env bash
# Starts a real kube-apiserver on a running store:
#   make run                  in one terminal
#   deploy/local-kube.sh      in another; then use the kubectl line that it prints
# Options: --store URL  --dir DIRECTORY  --port PORT  [-- KUBE-APISERVER FLAGS]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

refuse() {
    echo "local-kube: $*" >&2
    exit 1
}

listens() {
    (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null
}

# Before the build, which takes minutes the first time: what local-kube would refuse after it.
store=http://127.0.0.1:2379 port=6443
words=("$@")
while ((${#words[@]})); do
    word=${words[0]/#--/-}
    case $word in
        -h | -help) sed -n '2,/^[^#]/s/^# //p' "$0" && exit ;;
        -store=*) store=${word#*=} ;;
        -port=*) port=${word#*=} ;;
        -store) store=${words[1]-} words=("${words[@]:1}") ;;
        -port) port=${words[1]-} words=("${words[@]:1}") ;;
        -dir) words=("${words[@]:1}") ;;
        -dir=*) ;;
        *) break ;;
    esac
    words=("${words[@]:1}")
done
[[ $store =~ ^[a-z]+://(\[([0-9a-fA-F:]+)\]|([^:/]+)):([0-9]+) ]] ||
    refuse "--store $store is not a URL like http://127.0.0.1:2379"
listens "${BASH_REMATCH[2]}${BASH_REMATCH[3]}" "${BASH_REMATCH[4]}" ||
    refuse "no store on $store (start one with \`make run\`)"
[[ $port =~ ^[0-9]+$ ]] || refuse "--port $port is not a number"
! listens 127.0.0.1 "$port" || refuse "port $port is not free (choose another with --port)"

"$root/tests/kube/build"
exec "$root/tests/kube/bin/local-kube" --dir "$root/data/kube" "$@"
