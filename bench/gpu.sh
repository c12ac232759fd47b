#!/usr/bin/env bash
# The GPU runs of the speed yardstick, within ten minutes, on a machine that has PyTorch but neither diffusers nor a network.
#
#   bench/gpu.sh wheels            where there is a network: fetch what is carried along into bench/wheels
#   bench/gpu.sh [SUITE] [OPTION]  there: measure what is not done yet; results in $OUT, or bench/results
#   bench/gpu.sh split MODEL ...   there: how the time of a call divides
#
# PYTHON is the interpreter, python3 by default; PYTHON_VERSION, 3.12 by default, is the one that wheels are for.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
python=${PYTHON:-python3} carried=bench/wheels

if [ "${1:-}" = wheels ]; then
    rm -rf "$carried"
    fetch() { "$python" -m pip download -q --python-version "${PYTHON_VERSION:-3.12}" --only-binary=:all: --dest "$carried" "$@"; }
    fetch diffusers rich typer
    fetch --no-deps tomesd # it needs torch alone, which is there
    du -sh "$carried"
    exit
fi

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
# What that machine has stays its own: its packages were chosen to work together, and with its torch.
missing=$("$python" - "$carried" <<'END'
import pathlib, re, sys
from importlib import metadata

have = {re.sub("[-.]", "_", each.name.lower()) for each in metadata.distributions() if each.name}
print(*(wheel for wheel in pathlib.Path(sys.argv[1]).glob("*.whl") if wheel.name.split("-")[0].lower() not in have), sep="\n")
END
)
if [ -n "$missing" ]; then
    mapfile -t wheels <<<"$missing"
    "$python" -m pip install -q --no-index --no-deps --target "$site" "${wheels[@]}"
fi

run() { # MODULE ARGUMENT...; what runs at the end of the ten minutes is stopped
    PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" timeout 570 "$python" -m "$@"
}
out=${OUT:-bench/results}

if [ "${1:-}" = split ]; then
    run bigain_fx.bench.split --device cuda --dtype bfloat16 --out "$out" "${@:2}"
else
    run bigain_fx.bench.cuda_graphs
    # Six runs compile side by side, then each is timed alone.
    export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-4}
    run bigain_fx.bench.suite "${1:-gpu}" --jobs 6 --limit 240 --out "$out" "${@:2}"
fi
