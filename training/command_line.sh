# Sourced by reproduce.sh and ablate.sh: reads `digits [--seeds N]`, prepares .venv.
source "$(dirname "$0")/commands.sh"

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
