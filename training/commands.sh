# Sourced first by reproduce*.sh and ablate.sh: changes to the repository's root; what all of them say, and how.
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "training/$(basename "$0")" >&2; exit 2; }
stage() { printf '\n== %s\n' "$*"; }
