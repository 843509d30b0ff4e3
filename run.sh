#!/usr/bin/env bash
# Set-up, the main job and the tests. Works from a fresh clone with a bare Python 3.10 or later.
#
#   ./run.sh [FLAGS]     distil: python dfkd.py --method rdskd FLAGS
#   ./run.sh test        the tests
#   ./run.sh bench       milliseconds per step, against the plain form of the same networks
#   ./run.sh table DATA [FLAGS]   mnist: the README's rows; cifar10: large pairs, for a GPU; stop it at will, the same command goes on
#
# torch 2.6 is the first whose torch.load(weights_only=True) is safe with hostile files (CVE-2025-32434).
# Where the current python3 (or $PYTHON) already has torch, it is used as it is; else everything goes into .venv.
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "run.sh: $1" >&2; exit 1; }

# Whether interpreter $1 can import numpy, a recent torch and the further modules $2.
has() { "$1" -c "import numpy, torch, $2; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6)" 2>/dev/null; }

# Install into .venv. torch's default build for Linux carries 5 GB of CUDA libraries: without an NVIDIA GPU, the CPU
# build is tried first, and with --no-index, lest an index that pip is configured with serve the default build after
# all. The last line installs what is still missing and is the fallback as well.
fetch() {
    local pip=(.venv/bin/python -m pip --disable-pip-version-check install -qq)
    if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1 && ! has .venv/bin/python sys; then
        "${pip[@]}" --no-deps --retries 1 --no-index --find-links https://download.pytorch.org/whl/cpu/torch/ \
            "torch>=2.6" 2>/dev/null || true
    fi
    "${pip[@]}" "torch>=2.6" numpy "$@"
}

# Set `python` to an interpreter that has what the job needs: module $1 beside torch and numpy.
set_up() {
    local base=${PYTHON:-python3}
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "'$base' is not Python 3.10 or later; install one, or name it: PYTHON=/path/to/python3 ./run.sh"
    python=$base
    has "$python" "$1" && return
    python=.venv/bin/python
    has "$python" "$1" && return
    echo "setting up .venv, once: torch, numpy${2:+, $2} (a few minutes)"
    local site=()
    has "$base" sys && site=(--system-site-packages)
    "$base" -m venv --clear ${site[@]+"${site[@]}"} .venv ||
        fail "cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
    fetch ${2:+"$2"} || fail "pip could not install what is needed; run again when the network is back"
    has "$python" "$1" || fail "torch does not work in .venv; remove .venv and run again"
}

# Make one run of a table, unless it is there: its name, then flags. A stopped one goes on.
row() {
    local name=$1
    shift
    [ -f "runs/$name/result.json" ] || "$python" dfkd.py --dataset "$data" --out "runs/$name" --resume "$@" ${more[@]+"${more[@]}"}
    rows+=("runs/$name")
}

table() {
    local seed memory method pair
    for seed in ${SEEDS:-0 1 2}; do
        if [ "$data" = mnist ]; then
            for method in noise kd rdskd mskd zskd soft-target; do row "mnist-$method-$seed" --method $method --seed $seed; done
            row "mnist-soft-target-logits-$seed" --method soft-target --layer logits --seed $seed
            for memory in none bank vae; do row "mnist-pre-$memory-$seed" --method pre --replay $memory --seed $seed; done
            row "mnist-pre-no-teacher-term-$seed" --method pre --no-teacher-term --seed $seed
            row "mnist-pre-no-balanced-$seed" --method pre --no-balanced --seed $seed
            for memory in none vae; do row "mnist-dafl-$memory-$seed" --method dafl --replay $memory --seed $seed; done
        else
            for pair in "resnet34 resnet18" "wrn-40-2 wrn-16-1"; do
                for method in pre rdskd soft-target dafl; do
                    row "$data-${pair// /-}-$method-$seed" --teacher-arch ${pair% *} --student-arch ${pair#* } --method $method --seed $seed
                done
            done
        fi
    done
    if [ "$data" = mnist ]; then  # nothing keeps G's classes apart, and G and S move fast: see the README
        for seed in ${SEEDS:-0 1 2}; do
            for memory in none bank vae; do
                row "mnist-drift-$memory-$seed" --method pre --replay $memory --seed $seed --loss-weights 1 0 0 \
                    --generator-lr 0.2 --student-lr 2e-3 --student-decay none --steps 3000
            done
        done
    fi
    "$python" dfkd.py --table "${rows[@]}"
}

case "${1:-}" in
    test)
        shift
        set_up pytest pytest
        exec "$python" -m pytest -q -p no:cacheprovider test_dfkd.py "$@"
        ;;
    bench)
        set_up pytest pytest
        exec "$python" test_dfkd.py
        ;;
    table)
        data=${2:-} rows=()
        case "$data" in mnist | cifar10) ;; *) fail "./run.sh table needs mnist or cifar10" ;; esac
        more=("${@:3}")
        set_up sys
        table
        ;;
    "" | -*)
        set_up sys
        exec "$python" dfkd.py --method rdskd "$@"
        ;;
    *) fail "unknown job '$1'; the jobs are test, bench, table, or none for the main job" ;;
esac
