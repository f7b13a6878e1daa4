#!/usr/bin/env bash
# From nothing to a measured Raptor on the embedded digits: teacher, phases, Raptor, linear probe, report, model card.
#
#   usage: bash training/reproduce.sh digits [--full] [--seeds N]
#          bash training/reproduce.sh dinov2_small --images IMAGES [--teacher ID_OR_FOLDER] [--segmentation FOLDER] [...]
#          bash training/reproduce.sh study [--quick] [--images IMAGES [--teacher ID_OR_FOLDER]]
#
# The second is reproduce_dinov2.sh, the third reproduce_study.sh, which say their options; what follows is about the
# first. By default it makes one Raptor of three blocks and judges it on one task. --full makes Raptors of 2, 3 and 4
# blocks and one with a random start, judges them on three tasks, and looks at depth as a dynamical system.
# Finished stages are skipped, a stage that was interrupted goes on where it stopped.
# On GPUs: LAUNCH="accelerate launch" bash training/reproduce.sh digits
set -euo pipefail
case "${1:-}" in
  dinov2_*) exec bash "$(dirname "$0")/reproduce_dinov2.sh" "$@" ;;
  study) exec bash "$(dirname "$0")/reproduce_study.sh" "$@" ;;
esac
source "$(dirname "$0")/commands.sh"
read_digits_options "$@"
ks=(3) tasks=(classification)
if [ -n "$full" ]; then ks=(2 3 4) tasks=(classification segmentation depth); fi

stage "teacher: a 12-layer DINOv2 with registers, trained on the digits"
$launch training/train_teacher.py "$recipes/digits_teacher.yaml" --resume --output_dir "$out/teacher"

stage "activations: every state of the teacher, 8 views of every training image"
$launch training/extract_activations.py "$recipes/digits_activations.yaml" --resume \
  --teacher "$out/teacher" --output_dir "$out/activations"

stage "phases: where the teacher's depth falls into runs of similar layers"
python training/find_phases.py --resume --activations "$out/activations" --k 2 3 4 --output_dir "$out/phases"

results=()
for ((seed = 0; seed < seeds; seed++)); do
  run="$out/seed_$seed" models=() classifiers=()
  from=(--resume --seed $seed --teacher "$out/teacher" --activations "$out/activations"
        --phases_file "$out/phases/phases.json")
  for k in "${ks[@]}"; do
    stage "Raptor of $k blocks, seed $seed"
    $launch training/distill_raptor.py "$recipes/digits_raptor.yaml" "${from[@]}" --k $k --output_dir "$run/raptor_k$k"
    models+=("raptor_k$k=$run/raptor_k$k")
    classifiers+=("raptor_k$k=$run/classification/models/raptor_k$k")
  done
  random=()
  if [ -n "$full" ]; then
    stage "the same with 3 blocks that start at random, seed $seed: for comparison"
    random=("raptor_k3_random_init=$run/raptor_k3_random_init")
    $launch training/distill_raptor.py "$recipes/digits_raptor.yaml" "${from[@]}" --k 3 --init random \
      --output_dir "$run/raptor_k3_random_init"
  fi

  for task in "${tasks[@]}"; do
    stage "$task: linear heads on teacher and Raptors, seed $seed"
    $launch evaluation/probe.py "$recipes/digits_${task}_probe.yaml" --resume --seed $seed --teacher "$out/teacher" \
      --models "${models[@]}" ${random[@]+"${random[@]}"} --output_dir "$run/$task"
    results+=("$run/$task/results")
    random=()  # only classification judges the random start
  done

  if [ -n "$full" ]; then
    stage "depth as a dynamical system, seed $seed"
    python -m evaluation.dynamics "$recipes/digits_dynamics.yaml" --resume --seed $seed \
      --phases_file "$out/phases/phases.json" --model "$out/teacher" "${classifiers[@]}" --output_dir "$run/dynamics"
  fi
done

stage "report and model cards"
more=()
[ ! -d "$out/ablation/seed_0/tuned_head/results" ] || more=(--ablation "$out/ablation")
python evaluation/report.py --results "${results[@]}" --phases "$out/phases" ${more[@]+"${more[@]}"} \
  --output_dir "$out/report"
cards=()
for k in "${ks[@]}"; do cards+=("$out/seed_0/classification/models/raptor_k$k"); done
python model_cards/render.py --results "${results[@]}" --models "${cards[@]}"
