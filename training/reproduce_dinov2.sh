#!/usr/bin/env bash
# From a DINOv2 and a dataset of photographs to measured Raptors of 2, 3 and 4 blocks, and a report of them.
#
#   bash training/reproduce.sh dinov2_small --images IMAGES
#
# Phases, Raptors (the teacher computes its states online), probes, depth as a dynamical system, report, model cards.
# Each training prints first what it will cost. Finished stages are skipped, an interrupted one goes on where it stopped.
#
#   --images NAME             a folder <NAME>/<split>/<class>/<image>, or a dataset of the Hub
#   --teacher ID_OR_FOLDER    default: facebook/dinov2-small; a larger one with dinov2_base
#   --segmentation FOLDER     images and masks in ADE20k's layout: linear segmentation too
#   --train_split, --test_split NAME   default: train and, of a folder, val; of Tiny-ImageNet on the Hub, valid
#   --resolution PIXELS       of the images, a multiple of the patch; default: as the teacher's image processor says
#   --steps N                 updates of each Raptor; default: those of the recipe
#   --seeds N                 default: 1
#
# Results go to outputs/dinov2_small (OUT); recipes are those of training/recipes (RECIPES).
set -euo pipefail
source "$(dirname "$0")/commands.sh"

line=${1:-}; shift || usage
case $line in
  dinov2_small) teacher=facebook/dinov2-small ;;
  dinov2_base) teacher=facebook/dinov2-base ;;
  *) usage ;;
esac
images=zh-plus/tiny-imagenet segmentation= train_split=train test_split= resolution= steps= seeds=1
while [ $# -gt 0 ]; do
  case $1 in
    --images | --teacher | --segmentation | --train_split | --test_split | --resolution | --steps | --seeds)
      [ $# -ge 2 ] || usage
      printf -v "${1#--}" %s "$2"; shift 2 ;;
    *) echo "no option $1" >&2; usage ;;
  esac
done
if [ -z "$test_split" ]; then
  test_split=val
  [ "$images" != zh-plus/tiny-imagenet ] || test_split=valid
fi

source training/environment.sh
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}  # threads that wait leave the cores to others
out=${OUT:-outputs/$line}
recipes=${RECIPES:-training/recipes}

launch=${LAUNCH:-python} precision=float32
workers=$(($(python -c 'import os; print(len(os.sched_getaffinity(0)))') - 2))
[ $workers -ge 1 ] || workers=1
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  launch=${LAUNCH:-accelerate launch --mixed_precision bf16 --dynamo_backend inductor --num_processes 1}
  precision=bfloat16
fi
pixels=(); [ -z "$resolution" ] || pixels=(--resolution $resolution)
updates=()
if [ -n "$steps" ]; then
  warmup=$((steps / 20 < 400 ? steps / 20 : 400))  # a recipe's own may be longer than the run
  updates=(--steps $steps --warmup_steps $((warmup < 1 ? 1 : warmup)))
fi
read_with=(--num_workers $workers "${pixels[@]}")
probe=(--teacher "$teacher" --num_workers $workers)
learn=(--teacher "$teacher" --dataset "$images" --split $train_split --precision $precision
       --validation_dataset "$images" --validation_split $test_split "${read_with[@]}" "${updates[@]}")

stage "phases: where the teacher's depth falls into runs of similar layers"
python training/find_phases.py --resume --teacher "$teacher" --dataset "$images" --split $train_split \
  --num_images 1000 "${read_with[@]}" --k 2 3 4 --output_dir "$out"/phases

results=()
for ((seed = 0; seed < seeds; seed++)); do
  run="$out/seed_$seed"
  models=()
  for k in 2 3 4; do
    stage "Raptor of $k blocks, seed $seed"
    $launch training/distill_raptor.py "$recipes"/dinov2_raptor.yaml "${learn[@]}" --resume --seed $seed \
      --phases_file "$out"/phases/phases.json --k $k --output_dir "$run"/raptor_k$k
    models+=("raptor_k$k=$run/raptor_k$k")
  done

  stage "classification: linear heads and nearest neighbours on teacher and Raptors, seed $seed"
  $launch evaluation/probe.py "$recipes"/dinov2_classification_probe.yaml --resume --seed $seed "${probe[@]}" \
    --dataset "$images" --train_split $train_split --test_split $test_split "${pixels[@]}" \
    --models "${models[@]}" --output_dir "$run"/classification
  results+=("$run"/classification/results)

  if [ -n "$segmentation" ]; then
    stage "segmentation: linear heads on teacher and Raptors, seed $seed"
    $launch evaluation/probe.py "$recipes"/dinov2_segmentation_probe.yaml --resume --seed $seed "${probe[@]}" \
      --dataset "$segmentation" --models "${models[@]}" --output_dir "$run"/segmentation
    results+=("$run"/segmentation/results)
  fi

  stage "depth as a dynamical system, seed $seed"
  python -m evaluation.dynamics "$recipes"/dinov2_dynamics.yaml --resume --seed $seed "${read_with[@]}" \
    --dataset "$images" --split $test_split --phases_file "$out"/phases/phases.json \
    --model teacher="$teacher" "${models[@]}" --output_dir "$run"/dynamics
done

stage "report and model cards"
python evaluation/report.py --results "${results[@]}" --phases "$out"/phases --output_dir "$out"/report
python model_cards/render.py --results "${results[@]}" \
  --models "$out"/seed_0/classification/models/raptor_k{2,3,4}
