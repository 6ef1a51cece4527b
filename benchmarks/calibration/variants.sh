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
side_by_side() { xargs -d '\n' -P "$JOBS" -I{} bash -c '{}'; }
reuse() { echo "--set reuse=$PLACE/$1 --set dense_share=0"; }
made default
# Losses that another has measured with the same bypasses and scores come along; so of those without bypasses, and of those
# with causal scores, one goes first. They leave blocks out in every pass, but for those that say otherwise.
{
  echo "made both-curves-0.9-bare $(reuse default) --set keep=0.9 --set bypass_rank=0"
  echo "made both-curves-0.9-causal $(reuse default) --set keep=0.9 --set score=causal"
  for keep in 0.9 0.75 0.5; do
    for way in algorithm1 curves; do
      echo "made both-$way-$keep $(reuse default) --set allocation=$way --set keep=$keep"
    done
  done
  # Attention alone: keep counts both branches, so these are 0.8, 0.5 and 0.25 of attention's.
  for keep in 0.9 0.75 0.625; do
    for way in algorithm1 curves; do
      echo "made attention-$way-$keep $(reuse default) --set allocation=$way --set keep=$keep --set branches=attention"
    done
  done
  # Fewer dense passes, so that the others keep 0.5, 0.375 and 0.8.
  for dense in 0.5 0.6; do echo "made default-0.75-dense-$dense --set reuse=$PLACE/default --set dense_share=$dense"; done
  echo "made default-0.9-dense-0.5 --set reuse=$PLACE/default --set keep=0.9 --set dense_share=0.5"
} | side_by_side
causal() {
  echo "made causal-$1-dense-$2 --set reuse=$PLACE/both-curves-0.9-causal --set score=causal --set keep=$1 --set dense_share=$2"
}
{
  for keep in 0.75 0.5; do
    echo "made both-curves-$keep-bare $(reuse both-curves-0.9-bare) --set keep=$keep --set bypass_rank=0"
    echo "made both-curves-$keep-causal $(reuse both-curves-0.9-causal) --set keep=$keep --set score=causal"
  done
  for keep in 0.9 0.75 0.625; do
    echo "made attention-curves-$keep-bare $(reuse both-curves-0.9-bare) --set keep=$keep --set bypass_rank=0 --set branches=attention"
    echo "made attention-curves-$keep-causal $(reuse both-curves-0.9-causal) --set keep=$keep --set score=causal --set branches=attention"
  done
  causal 0.9 0.5
  causal 0.75 0.5
  causal 0.75 0.6
} | side_by_side
