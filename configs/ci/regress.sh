#!/usr/bin/env bash
# An engine in CI: build it, judge it against a baseline, publish what was found.
#
# Usage: configs/ci/regress.sh run|record|keep|comment
#   run      build ENGINE, judge it, leave REPORTS; status 0 passed, 1 regressed, 2 could not run,
#            3 cannot tell
#   record   build ENGINE, and record its answers as BASELINE, to be committed
#   keep     build ENGINE, and copy it to BASELINE, for CI's cache to keep
#   comment  REPORTS/report.md as the one comment on this pull request (gh, GH_TOKEN) or merge
#            request (curl, python3, REGRESS_TOKEN)
#
# MODEL         a path or a hub id, built as ENGINE; without it, ENGINE is there already
# QUANT, TP, BACKEND, CONFIG  of the build, as `enginehouse build` takes them
# ENGINE        the new engine's directory (default engines/new)
# BASELINE      an engine's directory or a recording (default engines/baseline)
# REFERENCE     an unquantised checkpoint to compare with as well
# SUITE, LIMITS  files of what is asked, and of how much may differ (docs/regress.md)
# ONLY          groups of checks: numerics, quality, behaviour, speed (default all)
# REPORTS       where junit.xml, report.html, report.md and report.json go (default regress-reports)
# CANNOT_TELL   pass or fail: what that counts as, instead of status 3
# ENGINEHOUSE   the program (default: this checkout's, else the one on PATH)
set -euo pipefail
engine=${ENGINE:-engines/new}
baseline=${BASELINE:-engines/baseline}
reports=${REPORTS:-regress-reports}

refuse() {
  echo "regress.sh: $1" >&2
  exit 2
}

find_program() {
  local root
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
  program=${ENGINEHOUSE:-$root/${VENV:-.venv}/bin/enginehouse}
  [[ -n ${ENGINEHOUSE:-} || -x $program ]] || program=enginehouse
  command -v "$program" >/dev/null || refuse "$program is not installed: run make ready"
}

build() { # a build that failed could not run, whatever its own status
  if [[ -n ${MODEL:-} ]]; then
    "$program" build "$MODEL" -o "$engine" ${QUANT:+--quant "$QUANT"} ${TP:+--tp "$TP"} \
      ${BACKEND:+--backend "$BACKEND"} ${CONFIG:+--config "$CONFIG"} ||
      refuse "building $engine from $MODEL ended with status $?"
  fi
  [[ -d $engine ]] || refuse "there is no engine $engine: give MODEL, or ENGINE that was built"
}

judge() {
  [[ -e $baseline ]] || refuse "there is no baseline $baseline: make it with record or keep"
  local status=0
  rm -f -- "$reports"/{junit.xml,report.md,report.html,report.json} # an earlier run's are not this one's
  "$program" regress run "$engine" --baseline "$baseline" --out "$reports" \
    ${SUITE:+--suite "$SUITE"} ${LIMITS:+--limits "$LIMITS"} ${ONLY:+--only $ONLY} \
    ${REFERENCE:+--reference "$REFERENCE"} ${CANNOT_TELL:+--cannot-tell "$CANNOT_TELL"} || status=$?
  if [[ -n ${GITHUB_STEP_SUMMARY:-} && -f $reports/report.md ]]; then
    cat "$reports/report.md" >>"$GITHUB_STEP_SUMMARY"
  fi
  return "$status"
}

record() {
  "$program" regress record "$engine" -o "$baseline" ${SUITE:+--suite "$SUITE"} ${LIMITS:+--limits "$LIMITS"} \
    ${ONLY:+--only $ONLY}
}

keep() { # whole or not at all: CI's cache takes what is there when a job is ended
  rm -rf -- "$baseline.unfinished"
  mkdir -p -- "$(dirname "$baseline")"
  cp -a -- "$engine" "$baseline.unfinished"
  rm -rf -- "$baseline"
  mv -- "$baseline.unfinished" "$baseline"
}

comment() { # an earlier run's comment begins with the same line, and is written anew
  [[ -f $reports/report.md ]] || refuse "there is no $reports/report.md: run comes before comment"
  local marker
  read -r marker <"$reports/report.md"
  if [[ ${GITHUB_REF:-} =~ ^refs/pull/([0-9]+)/ ]]; then
    on_github "${BASH_REMATCH[1]}" "$marker"
  elif [[ -n ${CI_MERGE_REQUEST_IID:-} ]]; then
    on_gitlab "$marker"
  else
    refuse "neither GITHUB_REF nor CI_MERGE_REQUEST_IID names a request to comment on"
  fi
}

on_github() {
  local issues=repos/$GITHUB_REPOSITORY/issues found
  found=$(MARKER=$2 gh api --paginate "$issues/$1/comments?per_page=100" \
    --jq '.[] | select(.body | startswith(env.MARKER)) | .id')
  found=${found%%$'\n'*}
  if [[ -n $found ]]; then
    gh api --silent --method PATCH "$issues/comments/$found" -F "body=@$reports/report.md"
  else
    gh api --silent --method POST "$issues/$1/comments" -F "body=@$reports/report.md"
  fi
}

on_gitlab() {
  local notes=$CI_API_V4_URL/projects/$CI_PROJECT_ID/merge_requests/$CI_MERGE_REQUEST_IID/notes found
  : "${REGRESS_TOKEN:?of a project access token with the scope api}"
  found=$(gitlab "$notes?per_page=100" | python3 -c 'import json, sys
notes = json.load(sys.stdin)
print(next((note["id"] for note in notes if note["body"].startswith(sys.argv[1])), ""))' "$1")
  gitlab --output /dev/null --request "$([[ -n $found ]] && echo PUT || echo POST)" \
    --data-urlencode "body@$reports/report.md" "$notes${found:+/$found}"
}

gitlab() { # the token as a file's content: a command line is for everybody to read
  curl --fail --silent --show-error --header @<(printf 'PRIVATE-TOKEN: %s\n' "$REGRESS_TOKEN") "$@"
}

case ${1:-} in
  run) find_program && build && judge ;;
  record) find_program && build && record ;;
  keep) find_program && build && keep ;;
  comment) comment ;;
  *) refuse "wanted run, record, keep or comment, found '${1:-}'" ;;
esac
