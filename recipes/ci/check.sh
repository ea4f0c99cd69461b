#!/usr/bin/env bash
# doctor and smoke, one after the other, on any platform; their files in one folder; one exit status for both.
#
#   check.sh [MODEL] [--tp N] [--out DIR] [-- OPTION...]
#
# MODEL is a folder or a hub's name; without one, smoke makes a toy.  What follows `--` goes to smoke as it is.
# Both are run, also if doctor fails: what smoke says is most wanted then.  The exit status is the worse of the two: 0,
# 1 where a check failed, 2 for a command that was not understood, more where one of them crashed.
set -euo pipefail

usage() {
    sed -n 's/^# \{0,1\}//; 2,8p' "${BASH_SOURCE[0]}"
}

refuse() {
    echo "check.sh: $1" >&2
    exit 2
}

SAFE="${ASCEND_SAFE:-ascend-safe}" # the program, where it is not on the path
OUT=outputs/check
MODEL=
SMOKE=()

while [[ $# -gt 0 ]]; do
    case "$1" in
        --tp | --out)
            [[ $# -ge 2 && -n "$2" ]] || refuse "$1 needs a value"
            if [[ "$1" == --out ]]; then
                OUT="$2"
            else
                [[ "$2" =~ ^[1-9][0-9]*$ ]] || refuse "--tp needs a number of devices, not '$2'"
                SMOKE+=(--tp "$2")
            fi
            shift 2
            ;;
        --)
            shift
            SMOKE+=("$@")
            break
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        -*) refuse "$1 is not understood: what is meant for smoke follows --" ;;
        *)
            [[ -z "$MODEL" ]] || refuse "one model at a time, not both '$MODEL' and '$1'"
            MODEL="$1"
            shift
            ;;
    esac
done

command -v "$SAFE" >/dev/null || refuse "$SAFE is not on the path: install verl-ascend-rollout, or set ASCEND_SAFE"
mkdir -p "$OUT"

echo "== doctor"
doctor=0
"$SAFE" doctor --json "$OUT/doctor.json" --markdown "$OUT/doctor.md" --junit "$OUT/doctor.junit.xml" || doctor=$?

echo "== smoke"
smoke=0
# A plain ${SMOKE[@]} of nothing is an error for the bash of some systems (before 4.4).
"$SAFE" smoke "${MODEL:---tiny}" --out "$OUT" ${SMOKE[@]+"${SMOKE[@]}"} || smoke=$?

echo "== doctor $doctor, smoke $smoke; files in $OUT"
exit $((doctor > smoke ? doctor : smoke))
