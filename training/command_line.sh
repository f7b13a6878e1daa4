# Sourced by reproduce.sh and ablate.sh: reads `digits [--seeds N]`, changes to the repository's root, prepares .venv.
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "training/$(basename "$0")" >&2; exit 2; }
[ "${1:-}" = digits ] || usage
seeds=1
if [ $# -gt 1 ]; then
  [ $# = 3 ] && [ "$2" = --seeds ] && [[ "$3" =~ ^[1-9][0-9]*$ ]] || usage
  seeds=$3
fi

source training/environment.sh
launch=${LAUNCH:-python}
out=${OUT:-outputs/digits}
recipes=${RECIPES:-training/recipes}
stage() { printf '\n== %s\n' "$*"; }
