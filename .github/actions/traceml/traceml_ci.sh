#!/usr/bin/env bash
# The steps of the action: `traceml_ci.sh install`, then `traceml_ci.sh check`. Inputs come as variables, and never as text
# inside a script; TRACEML_* would be settings. `check` ends with 0 and leaves the job's status in its outputs, so that the
# report is kept before the job fails.
set -euo pipefail

# What later steps read.
output() { echo "$1=$2" >> "$GITHUB_OUTPUT"; }

# Lines for the job's summary and for the comment.
say() { printf '%s\n' "$@" >> "$comment"; }

install() {
  local what=${ACTION_TRACEML_INSTALL:-}
  python -m pip install --disable-pip-version-check "${what:-$ACTION_TRACEML_ACTION/../../..}"
}

# Keep the first failure that matters: of the script, then of a gate.
fail() { [ "$status" != 0 ] || status=$1; }

train() {
  export TRACEML_RUNS_DIR=$folder/runs
  # The text is a command line, as `run:` in a workflow is.
  eval "traceml run --live none ${ACTION_TRACEML_RUN:?input run is missing}" || status=$?
  local made=$TRACEML_RUNS_DIR/latest
  if [ -f "$made/report.json" ]; then
    cp "$made/report.json" "$made/report.html" "$folder/kept/" 2> /dev/null || true
  fi
}

findings() {
  local kinds=${ACTION_TRACEML_FAIL_ON:-} code=0
  # shellcheck disable=SC2086 # kinds are words
  traceml report latest --md ${kinds:+--fail-on $kinds} >> "$comment" 2> "$folder/gate.txt" || code=$?
  if [ "$code" != 0 ]; then
    say "" "**$(cat "$folder/gate.txt")**"
    cat "$folder/gate.txt" >&2
    fail "$code"
  fi
}

comparison() {
  local base=${ACTION_TRACEML_BASELINE:-} code=0
  [ -n "$base" ] || return 0
  [ ! -d "$base" ] || base=$base/report.json
  if [ ! -f "$base" ]; then
    say "" "No baseline yet: $base does not exist. Keep this run's report.json as the next one."
    return 0
  fi

  say "" "## Compared with the baseline" ""
  traceml compare "$base" latest --md >> "$comment" || { code=$?; fail "$code"; return 0; }
  traceml compare "$base" latest --json --fail-over "${ACTION_TRACEML_FAIL_OVER:-10}" \
    > "$folder/kept/comparison.json" 2> "$folder/gate.txt" || code=$?
  outcome=$(key "$folder/kept/comparison.json" outcome)
  case $code in
    0) ;;
    3) say "" "$(cat "$folder/gate.txt")"
       [ "${ACTION_TRACEML_FAIL_ON_UNKNOWN:-false}" != true ] || fail 3 ;;
    *) say "" "**$(cat "$folder/gate.txt")**"
       cat "$folder/gate.txt" >&2
       fail "$code" ;;
  esac
}

# A value of a JSON file: `key FILE NAME...`
key() {
  python -c 'import functools, json, sys; print(functools.reduce(lambda d, k: d[k], sys.argv[2:], json.load(open(sys.argv[1]))))' "$@"
}

check() {
  folder=$(mktemp -d "${RUNNER_TEMP:-/tmp}/traceml.XXXXXX")
  mkdir "$folder/kept"
  comment=$folder/kept/comment.md
  status=0 outcome=none
  train
  if [ -f "$folder/kept/report.json" ]; then
    say "## traceml: $(key "$folder/kept/report.json" verdict kind)" ""
    findings
    comparison
    output verdict "$(key "$folder/kept/report.json" verdict kind)"
    output report "$folder/kept/report.json"
  else
    say "## traceml" "" "There is no report: the command ended with $status, and left no run in TRACEML_RUNS_DIR."
    fail 3
  fi

  cat "$comment" >> "${GITHUB_STEP_SUMMARY:-/dev/null}"
  output outcome "$outcome"
  output comment-file "$comment"
  output folder "$folder/kept"
  output status "$status"
}

case ${1:-} in
  install | check) "$1" ;;
  *) echo "usage: traceml_ci.sh install|check" >&2; exit 2 ;;
esac
