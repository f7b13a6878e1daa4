#!/usr/bin/env bash
# From nothing to a measured Raptor: teacher, activations, phases, Raptors, three tasks, dynamics, report, model card.
#
#   usage: bash training/reproduce.sh digits [--seeds N]
#          bash training/reproduce.sh dinov2_small --images IMAGES [--teacher ID_OR_FOLDER] [--segmentation FOLDER] [...]
#          bash training/reproduce.sh study [--quick] [--images IMAGES [--teacher ID_OR_FOLDER]]
#
# The second is reproduce_dinov2.sh, the third reproduce_study.sh, which say their options; what follows is about the
# first.
# Finished stages are skipped, a stage that was interrupted goes on where it stopped. About fifteen minutes on two
# cores. On GPUs: LAUNCH="accelerate launch" bash training/reproduce.sh digits
set -euo pipefail
if [[ "${1:-}" == dinov2_* ]]; then exec bash "$(dirname "$0")/reproduce_dinov2.sh" "$@"; fi
if [ "${1:-}" = study ]; then exec bash "$(dirname "$0")/reproduce_study.sh" "$@"; fi
source "$(dirname "$0")/command_line.sh"

stage "teacher: a 12-layer DINOv2 with registers, trained on the digits"
$launch training/train_teacher.py $recipes/digits_teacher.yaml --resume --output_dir $out/teacher

stage "activations: every state of the teacher, 8 views of every training image"
$launch training/extract_activations.py $recipes/digits_activations.yaml --resume \
  --teacher $out/teacher --output_dir $out/activations

stage "phases: where the teacher's depth falls into runs of similar layers"
python training/find_phases.py --resume --activations $out/activations --k 2 3 4 --output_dir $out/phases

results=()
for ((seed = 0; seed < seeds; seed++)); do
  run=$out/seed_$seed
  from=(--resume --seed $seed --teacher $out/teacher --activations $out/activations
        --phases_file $out/phases/phases.json)

  models=()
  for k in 2 3 4; do
    stage "Raptor of $k blocks, seed $seed"
    $launch training/distill_raptor.py $recipes/digits_raptor.yaml "${from[@]}" --k $k --output_dir $run/raptor_k$k
    models+=(raptor_k$k=$run/raptor_k$k)
  done

  stage "the same with 3 blocks that start at random, seed $seed: for comparison"
  $launch training/distill_raptor.py $recipes/digits_raptor.yaml "${from[@]}" --k 3 --init random \
    --output_dir $run/raptor_k3_random_init
  models+=(raptor_k3_random_init=$run/raptor_k3_random_init)

  for task in classification segmentation depth; do
    stage "$task: linear heads on teacher and Raptors, seed $seed"
    [ $task = classification ] || models=("${models[@]:0:3}")  # only classification judges the random start
    $launch evaluation/probe.py $recipes/digits_${task}_probe.yaml --resume --seed $seed \
      --teacher $out/teacher --models "${models[@]}" --output_dir $run/$task
    results+=($run/$task/results)
  done

  classifiers=()
  for k in 2 3 4; do classifiers+=(raptor_k$k=$run/classification/models/raptor_k$k); done

  stage "depth as a dynamical system, seed $seed"
  python -m evaluation.dynamics $recipes/digits_dynamics.yaml --resume --seed $seed --phases_file $out/phases/phases.json \
    --model $out/teacher "${classifiers[@]}" --output_dir $run/dynamics
done

stage "report and model cards"
ablation=()
[ ! -d $out/ablation/seed_0/tuned_head/results ] || ablation=(--published True --ablation $out/ablation)
python evaluation/report.py --results "${results[@]}" --phases $out/phases \
  --pair raptor_k3 raptor_k3_random_init "${ablation[@]}" --output_dir $out/report
python model_cards/render.py --results "${results[@]}" \
  --models $out/seed_0/classification/models/raptor_k{2,3,4}
