#!/usr/bin/env bash
# From nothing to a measured Raptor: teacher, activations, phases, blocks, Raptors, three tasks, report, model card.
#
#   bash training/reproduce.sh digits [--seeds N]
#
# Finished stages are skipped, a stage that was interrupted goes on where it stopped. About fourteen minutes on two
# cores. On GPUs: LAUNCH="accelerate launch" bash training/reproduce.sh digits
set -euo pipefail
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

  stage "blocks, seed $seed: one for every phase of k = 2, 3, 4, in one run"
  $launch training/pretrain_blocks.py $recipes/digits_blocks.yaml "${from[@]}" --k 2 3 4 --output_dir $run/blocks

  models=()
  for k in 2 3 4; do
    stage "Raptor of $k blocks, seed $seed: end to end"
    $launch training/distill_raptor.py $recipes/digits_raptor.yaml "${from[@]}" --k $k \
      --blocks $run/blocks --output_dir $run/raptor_k$k
    models+=(raptor_k$k=$run/raptor_k$k)
  done

  stage "the same with 3 blocks that start at random, seed $seed: for comparison"
  $launch training/pretrain_blocks.py $recipes/digits_blocks.yaml "${from[@]}" --k 3 --init random \
    --output_dir $run/blocks_random_init
  $launch training/distill_raptor.py $recipes/digits_raptor.yaml "${from[@]}" --k 3 \
    --blocks $run/blocks_random_init --output_dir $run/raptor_k3_random_init
  models+=(raptor_k3_random_init=$run/raptor_k3_random_init)

  for task in classification segmentation depth; do
    stage "$task: linear heads on teacher and Raptors, seed $seed"
    [ $task = classification ] || models=("${models[@]:0:3}")  # only classification judges the random start
    $launch evaluation/probe.py $recipes/digits_${task}_probe.yaml --resume --seed $seed \
      --teacher $out/teacher --models "${models[@]}" --output_dir $run/$task
    results+=($run/$task/results)
  done
done

stage "report and model cards"
ablation=()
[ ! -d $out/ablation/seed_0/tuned_head/results ] || ablation=(--published True --ablation $out/ablation)
python evaluation/report.py --results "${results[@]}" --phases $out/phases \
  --pair raptor_k3 raptor_k3_random_init "${ablation[@]}" --output_dir $out/report
python model_cards/render.py --results "${results[@]}" \
  --models $out/seed_0/classification/models/raptor_k{2,3,4}
