#!/usr/bin/env bash
# Make a release, and say what was published, what missed a gate and by how much, and what failed.
#
#   release.sh RELEASE.toml OWNER [OPTION of aoconvert release ...]
#
# HF_TOKEN     who publishes
# RELEASE_LOG  the file for the events (release.jsonl)
#
# It exits as aoconvert does. What it reads is documented: exit codes, names of events, keys of the summary.
set -u
file=${1:?a release file} owner=${2:?a user or an organization}
shift 2
log=${RELEASE_LOG:-release.jsonl}

# in the background, so that this shell can pass on what stops it
aoconvert release "$file" --owner "$owner" --json "$@" >"$log" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' INT TERM
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # the wait was cut short by a signal
  wait "$child"
  code=$?
done

python3 - "$log" <<'END'
import json
import sys

summary, error = None, None
for line in open(sys.argv[1], encoding="utf-8"):
    document = json.loads(line)
    if document.get("event") == "summary":
        summary = document
    error = document.get("error") if "event" not in document else error
if error is not None:
    for problem in error["problems"]:
        print("error:", problem)
for variant in summary["variants"] if summary is not None else []:
    name, status = variant["name"], variant["status"]
    if status in ("pushed", "unchanged"):
        print(f"{status}: {name} {variant['url']} {variant['commit']} {variant['size_bytes']}")
    elif status == "gate_failed":
        for gate in variant["gates"]:
            if not gate["passed"]:
                print(f"gate missed: {name} {gate['name']} is {gate.get('value')}, required {gate['limit']}")
    elif status == "failed":
        print(f"failed: {name}: {variant['error']['message']}")
END

case $code in
  0) echo "all is published" ;;
  3) echo "refused, nothing was done: correct the release file" ;;
  4) echo "a variant is not good enough; the others are published" ;;
  5) echo "the Hub refused something, or was not there; what is made stays, the same command goes on" ;;
  130) echo "stopped; the same command goes on" ;;
  *) echo "failed with code $code" ;;
esac
exit "$code"
