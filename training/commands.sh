# Sourced first by reproduce*.sh and ablate.sh: changes to the repository's root; functions that all of them share.
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "training/$(basename "$0")" >&2; exit 2; }
stage() { printf '\n== %s\n' "$*"; }

# `digits [--full] [--seeds N]`; prepares .venv
read_digits_options() {
  [ "${1:-}" = digits ] || usage
  shift
  seeds=1 full=
  while [ $# -gt 0 ]; do
    case $1 in
      --full) full=1; shift ;;
      --seeds) [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || usage; seeds=$2; shift 2 ;;
      *) usage ;;
    esac
  done
  source training/environment.sh
  # models this small are as fast on one thread, and other work on the machine does not slow it down
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  launch=${LAUNCH:-python} out=${OUT:-outputs/digits} recipes=${RECIPES:-training/recipes}
}
