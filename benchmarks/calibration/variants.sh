#!/usr/bin/env bash
# The calibrations that benchmarks/quality/forward.yaml compares, in runs/calibrations/: one is fitted, the others reuse it.
#   LEMO="python -m lemo" JOBS=4 bash benchmarks/calibration/variants.sh
set -euo pipefail
LEMO=${LEMO:-lemo} JOBS=${JOBS:-1} PLACE=runs/calibrations CONFIG=benchmarks/calibration/smollm2.yaml
# Side by side, each would start a thread for every core.
[ "$JOBS" = 1 ] || export OMP_NUM_THREADS=2
made() { [ -f "$PLACE/$1/calibration.json" ] || $LEMO calibrate --config $CONFIG --output "$PLACE/$1" --resume "${@:2}"; }
export -f made
export LEMO PLACE CONFIG
made default-0.75
reuse="--set reuse=$PLACE/default-0.75"
{
  for keep in 0.9 0.5; do echo "made default-$keep $reuse --set keep=$keep"; done
  # The others leave blocks out in every pass.
  reuse="$reuse --set dense_share=0"
  for keep in 0.9 0.75 0.5; do
    for way in uniform algorithm1 curves; do
      echo "made both-$way-$keep $reuse --set allocation=$way --set keep=$keep"
    done
    echo "made both-curves-$keep-bare $reuse --set keep=$keep --set bypass_rank=0"
    echo "made both-curves-$keep-causal $reuse --set keep=$keep --set score=causal"
  done
  # Attention alone: keep counts both branches, so these are 0.8, 0.5 and 0.25 of attention's.
  for keep in 0.9 0.75 0.625; do
    for way in uniform algorithm1 curves; do
      echo "made attention-$way-$keep $reuse --set allocation=$way --set keep=$keep --set branches=attention"
    done
  done
} | xargs -d '\n' -P "$JOBS" -I{} bash -c '{}'
