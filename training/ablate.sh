#!/usr/bin/env bash
# The published ablation on the digits: what each part of the recipe adds, from teacher forcing alone to the whole.
#
#   usage: bash training/ablate.sh digits [--seeds N]
#
# After training/reproduce.sh digits, whose teacher, activations and phases it uses. About five minutes a seed on two
# cores; goes on where it was interrupted. Every row is the recipe of the row before and one thing more; rows 1-5 are
# judged with the teacher's own linear head as it is, and the last one fine-tunes that head.
set -euo pipefail
source "$(dirname "$0")/commands.sh"
read_digits_options "$@"
if [ ! -f "$out"/phases/phases.json ]; then
  echo "No teacher and no phases in $out: run bash training/reproduce.sh digits --full first." >&2
  exit 1
fi

for ((seed = 0; seed < seeds; seed++)); do
  run="$out"/ablation/seed_$seed
  from=(--resume --seed $seed --teacher "$out"/teacher --activations "$out"/activations
        --phases_file "$out"/phases/phases.json --k 3)

  # blocks NAME FLAGS: stage 1, and its blocks in a row without stage 2
  blocks() {
    stage "$1, seed $seed"
    $launch training/pretrain_blocks.py "$recipes"/digits_reference_blocks.yaml "${from[@]}" \
      --output_dir "$run"/$1_blocks "${@:2}"
    $launch training/distill_raptor.py "$recipes"/digits_reference_raptor.yaml "${from[@]}" --steps 0 \
      --blocks "$run"/$1_blocks --output_dir "$run"/$1
  }
  plain=(--depth_scaling False --last_block_weights none)
  blocks teacher_forcing --objective teacher_forcing "${plain[@]}"
  blocks autoregressive "${plain[@]}"
  blocks depth_scaling --last_block_weights none
  blocks weighted_cls

  stage "second_stage, seed $seed"
  $launch training/distill_raptor.py "$recipes"/digits_reference_raptor.yaml "${from[@]}" \
    --blocks "$run"/weighted_cls_blocks --output_dir "$run"/second_stage

  stage "judged with the teacher's head, seed $seed"
  models=()
  for name in teacher_forcing autoregressive depth_scaling weighted_cls second_stage; do
    models+=("$name=$run/$name")
  done
  # one head, the reference's way
  judge=(python evaluation/probe.py "$recipes"/digits_classification_probe.yaml --resume --seed $seed
         --teacher "$out"/teacher --head "$out"/teacher --learning_rate_grid 1 --poolings cls_patches)
  "${judge[@]}" --steps 0 --models "${models[@]}" --output_dir "$run"/head

  stage "tuned_classifier, seed $seed"
  "${judge[@]}" --models tuned_classifier="$run"/second_stage --output_dir "$run"/tuned_head
done

stage "model card of the reference's recipe, and report"
python model_cards/render.py --results "$out"/ablation/seed_*/head/results \
  --models "$out"/ablation/seed_0/head/models/second_stage
python evaluation/report.py --results "$out"/seed_*/{classification,segmentation,depth}/results --phases "$out"/phases \
  --ablation "$out"/ablation --output_dir "$out"/report
sed -n '/^## Ablation/,$p' "$out"/report/report.md
