#!/usr/bin/env bash
# Start Prometheus for the runs on this machine, print its targets, and run until Ctrl-C.
#   monitoring/try.sh [HOST:PORT | DIR]
# HOST:PORT: endpoint of a run (default: 127.0.0.1:9400, that of `make demo`). DIR: metrics.discovery_dir of the runs.
# PORT=n: port of Prometheus (default: 9090 or the next free one). Writes only to a temporary folder.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
target=${1:-127.0.0.1:9400}
port=${PORT:-9090}

fail() { echo "try.sh: $*" >&2; exit 2; }
in_use() { (: <>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
get() { curl --silent --fail --max-time 5 "http://127.0.0.1:$port/$1" "${@:2}"; }

for program in prometheus curl python3; do
    command -v "$program" >/dev/null || fail "$program is not on PATH; on Debian or Ubuntu: apt-get install $program"
done
while in_use "$port"; do port=$((port + 1)); done

folder=$(mktemp -d)
prometheus=
end() {
    [[ -z $prometheus ]] || { kill "$prometheus" 2>/dev/null && wait "$prometheus" || true; }
    rm -rf "$folder"
}
trap end EXIT
trap 'exit 0' INT TERM

cp -r "$here/rules" "$folder"
sed 's/^  scrape_interval: .*/  scrape_interval: 2s/' "$here/prometheus.yml" >"$folder/prometheus.yml"
if [[ -d $target ]]; then
    ln -s "$(cd "$target" && pwd)" "$folder/targets"
elif [[ $target =~ ^.+:[0-9]+$ ]]; then
    mkdir "$folder/targets"
    printf '[{"targets": ["%s"]}]\n' "$target" >"$folder/targets/here.json"
else
    fail "$target: neither a folder nor HOST:PORT"
fi

prometheus --config.file="$folder/prometheus.yml" --storage.tsdb.path="$folder/data" \
    --web.listen-address="127.0.0.1:$port" --log.level=warn >"$folder/log" 2>&1 &
prometheus=$!

targets='
import json, sys
found = json.load(sys.stdin)["data"]["activeTargets"]
for target in found:
    print("{health:8}{scrapeUrl}  {labels[instance]}  {lastError}".format(**target))
sys.exit(not found or any(target["health"] == "unknown" for target in found))'

echo "Waiting for Prometheus and its first scrape ..."
for ((i = 0; i < 120; i++)); do
    kill -0 "$prometheus" 2>/dev/null || { cat "$folder/log" >&2; fail "prometheus exited"; }
    if shown=$(get "api/v1/targets?state=active" | python3 -c "$targets" 2>/dev/null); then break; fi
    sleep 0.5
done
echo "Targets:"
echo "${shown:-none}"
echo
echo "Prometheus: http://127.0.0.1:$port/targets    alerts: http://127.0.0.1:$port/alerts"
echo "Try:        http://127.0.0.1:$port/graph?g0.expr=pkd_loss&g0.tab=0&g0.range_input=15m"
echo "Dashboard:  import $here/grafana/pkd.json in Grafana"
echo "Ctrl-C stops it."
wait "$prometheus"
