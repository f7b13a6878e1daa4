#!/usr/bin/env bash
# When is a ViT block-recurrent? Teachers, many short distillations, and what held of the paper's claims.
#
#   bash training/reproduce.sh study
#
# On the embedded digits: more than an hour on two cores. Finished stages and students are skipped, an interrupted
# run goes on where it stopped.
#
#   --quick                   a few students after a few steps: to see that it runs
#   --images NAME, --teacher ID_OR_FOLDER
#                             a pretrained teacher on these images (a folder <NAME>/<split>/<class>/<image>, or a
#                             dataset of the Hub) instead of the digits; no other teacher is trained
#   -- FLAGS                  for evaluation.recurrence.study, such as --resolution 98 --units 40
#
# Results go to outputs/study (OUT); the teacher of the digits is that of outputs/digits (DIGITS).
set -euo pipefail
source "$(dirname "$0")/commands.sh"

images=digits teacher= quick=
[ "${1:-}" = study ] || usage; shift
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=1; shift ;;
    --images | --teacher) [ $# -ge 2 ] || usage; printf -v "${1#--}" %s "$2"; shift 2 ;;
    --) shift; break ;;
    *) echo "no option $1" >&2; usage ;;
  esac
done
[ "$images" = digits ] || [ -n "$teacher" ] || usage

source training/environment.sh
out=${OUT:-outputs/study} digits=${DIGITS:-outputs/digits}
recipes=${RECIPES:-training/recipes}
processes=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')

study=(--dataset "$images" --validation_dataset "$images" --resume --output_dir "$out/results")
if [ -n "$teacher" ]; then
  stage "study of $teacher"
  exec python -m evaluation.recurrence.study "$recipes"/dinov2_study.yaml "${study[@]}" --teacher "$teacher" \
    --activations online --experiments gap partitions "$@"
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # models this small are as fast on one thread
teaching="$recipes/digits_teacher.yaml"
steps=$(sed -n 's/^steps: //p' "$teaching")
# three a drop rate (those of .1 are the digits teacher and seed_…), and checkpoints of three runs that overfit: at a
# constant learning rate, a training is the first part of a longer one
over="--views 1 --drop_path_rate 0 --label_smoothing 0 --weight_decay 0 --learning_rate 2e-3 --final_learning_rate 2e-3"
teachers=("untrained --steps 0 --warmup_steps 0" "drop_0.2 --drop_path_rate 0.2")
for seed in 0 1 2; do
  for length in $((steps / 2)) $((2 * steps)) $steps; do
    teachers+=("over_${seed}_$length --seed $seed --steps $length $over")
  done
done
teachers+=("seed_1 --seed 1" "seed_2 --seed 2")
for rate in 0 0.3 0.45 0.6; do teachers+=("drop_$rate --drop_path_rate $rate"); done
for seed in 1 2; do
  for rate in 0 0.2 0.3 0.45 0.6; do teachers+=("drop_${rate}_seed_$seed --drop_path_rate $rate --seed $seed"); done
done
if [ -n "$quick" ]; then
  teachers=("${teachers[@]::4}")
  study+=(--units 1 --k 1 3 --seeds 1 --validation_images 64)
fi

stage "the teacher"
python training/train_teacher.py "$teaching" --resume --output_dir "$digits/teacher"
python training/extract_activations.py "$recipes/digits_activations.yaml" --resume --teacher "$digits/teacher" \
  --output_dir "$digits/activations"

stage "${#teachers[@]} others, $processes at a time: untrained, drop rates, seeds, overfitting"
printf '%s\n' "${teachers[@]}" | xargs -P $processes -L 1 bash -c \
  'exec python training/train_teacher.py "$1" --resume "${@:4}" --output_dir "$2/$3"' teacher "$teaching" "$out"

stage "the study"
named=()
for words in "${teachers[@]}"; do named+=("${words%% *}=$out/${words%% *}"); done
python -m evaluation.recurrence.study "$recipes/digits_study.yaml" "${study[@]}" --teacher "$digits/teacher" \
  --activations "$digits/activations" --teachers "${named[@]}" "$@"
