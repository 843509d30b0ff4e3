#!/usr/bin/env bash
# Set-up, the main job and the tests. Works from a fresh clone with a bare Python 3.10 or later.
#
#   ./run.sh [FLAGS]     distil: python dfkd.py --method rdskd FLAGS (paths count from this folder)
#   ./run.sh test        the tests
#   ./run.sh bench       milliseconds per step, against the plain form of the same networks
#   ./run.sh table DATA [FLAGS]    the README's tables: glyphs (half an hour, no files); mnist (five seeds, two hours
#                                  each; SEEDS="0 1 2": three); cifar10 (where torch sees a GPU, the papers' pairs;
#                                  else, or with --device cpu, small pairs, a night)
#   ./run.sh claims DATA [FLAGS]   RDSKD's objective and PRE-DFKD's memory in parts, generators without --ours range,
#                                  three methods over ten settings: three seeds of 90 minutes each
#                                  Stop these two at will: the same command goes on.
#
# torch 2.6 is the first whose torch.load(weights_only=True) is safe with hostile files (CVE-2025-32434).
# Where the current python3 (or $PYTHON) already has torch, it is used as it is; else everything goes into .venv.
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")"

fail() { echo "run.sh: $1" >&2; exit "${2:-1}"; }

[ -f dfkd.py ] || fail "no dfkd.py in $PWD; call run.sh where it lies, not by a link"  # .venv would be made there

# Whether interpreter $1 can import numpy, a recent torch and, where it is named, module $2.
has() {
    local recent="tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6)"
    "$1" -c "import numpy, torch${2:+, $2}; assert $recent" 2>/dev/null
}

# Install into .venv. torch's default build for Linux carries 5 GB of CUDA libraries: without an NVIDIA GPU, the CPU
# build is tried first; with --no-index, because an index of pip's own configuration might serve the default build all
# the same. The last line installs what is still missing; it is the fallback, too.
fetch() {
    local pip=(.venv/bin/python -m pip --disable-pip-version-check install -qq)
    if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1 && ! has .venv/bin/python; then
        "${pip[@]}" --no-deps --retries 1 --no-index --find-links https://download.pytorch.org/whl/cpu/torch/ \
            "torch>=2.6" 2>/dev/null || true
    fi
    "${pip[@]}" "torch>=2.6" numpy "$@"
}

# Set `python` to an interpreter that has what the job needs: torch, numpy and, where it is named, package $1.
set_up() {
    local base=${PYTHON:-python3}
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "'$base' is not Python 3.10 or later; install one, or name it: PYTHON=/path/to/python3 ./run.sh"
    python=$base
    has "$python" "$@" && return
    python=.venv/bin/python
    has "$python" "$@" && return
    echo "setting up .venv, once: torch, numpy${1:+, $1} (a few minutes)"
    local site=()
    has "$base" && site=(--system-site-packages)
    "$base" -m venv --clear ${site[@]+"${site[@]}"} .venv ||
        fail "cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
    fetch "$@" || fail "pip could not install what is needed; run again when the network is back"
    has "$python" "$@" || fail "torch does not work in .venv; remove .venv and run again"
}

# Make one run of a table: its name without the seed, then flags. A stopped one goes on, a finished one is left alone,
# one that began with other flags is refused. Each seed has a teacher of its own.
row() {
    local name=table-$data-$1-$seed
    local flags=(--dataset "$data" --out "runs/$name" --resume --seed "$seed" --teacher-seed "$seed" "${@:2}"
        ${more[@]+"${more[@]}"})
    if [ "$only_check" ]; then
        to_check+=(--row "${flags[@]}")
    else
        rows+=("runs/$name")
        "$python" dfkd.py "${flags[@]}"
    fi
}

# A flag that one of the rows refuses ends the job (2) before its first run, not hours later.
check() {
    local only_check=yes to_check=() seed=0
    "$1"
    "$python" -c 'import dfkd, itertools, sys
for between, flags in itertools.groupby(sys.argv[1:], "--row".__eq__):
    between or dfkd.parse(list(flags))' "${to_check[@]}"
}

table() {
    local method memory
    if [ "$data" = cifar10 ]; then
        if [[ " ${more[*]-} " != *" --device"[\ =]"cpu "* ]] &&
            "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
            natural_on_a_gpu
        else
            natural_on_a_cpu
        fi
        return
    fi
    for method in rdskd dafl mskd zskd soft-target noise kd; do row $method --method $method; done
    for memory in none vae bank; do row pre-$memory --method pre --replay $memory; done
    [ "$data" = mnist ] || return 0
    row soft-target-logits --method soft-target --layer logits
    row dafl-vae --method dafl --replay vae
    for method in rdskd dafl mskd pre; do row $method-range --method $method --ours range; done  # without augment
    for memory in none bank vae; do  # G's classes may collapse, S's rate never falls, any pixel value
        row drift-$memory --method pre --replay $memory --loss-weights 1 0 0 --generator-lr 0.2 --student-lr 2e-3 \
            --student-decay none --steps 3000 --ours
    done
}

# The papers' pairs. ResNet-34 and AlexNet are PRE-DFKD's and soft-target synthesis's, WRN that of later comparisons.
natural_on_a_gpu() {
    local method memory layer
    for memory in vae bank none; do row resnet-pre-$memory --teacher-arch resnet34 --method pre --replay $memory; done
    for method in soft-target dafl mskd rdskd zskd deepinversion kd; do
        row resnet-$method --teacher-arch resnet34 --method $method
    done
    row wrn-deepinversion --teacher-arch wrn-40-2 --method deepinversion --loss-weights 0.001 0 1
    for method in dafl zskd pre rdskd soft-target kd; do row wrn-$method --teacher-arch wrn-40-2 --method $method; done
    for layer in fc2 logits; do
        row alexnet-soft-target-$layer --teacher-arch alexnet --method soft-target --layer $layer
    done
}

# A small pair; WRN-40-2 and the same student, for which figures are published; AlexNet and its half. 10 epochs of each
# teacher and 2,000 steps of a student, so that all of it fits into a night on two cores.
natural_on_a_cpu() {
    local short=(--teacher-epochs 10 --steps 2000) name="" L_bn=10 teacher method memory layer
    local images=("${short[@]}" --batch 64 --images 1024 --image-batch 256 --image-steps 200)
    local generator=("${short[@]}" --batch 128 --width 64)
    for teacher in wrn-16-2 wrn-40-2; do
        for method in kd noise; do
            row $name$method --teacher-arch $teacher --method $method "${short[@]}" --batch 64
        done
        row ${name}deepinversion --teacher-arch $teacher --method deepinversion "${images[@]}" \
            --loss-weights 0.001 0 $L_bn
        for method in soft-target zskd; do
            row $name$method --teacher-arch $teacher --method $method "${images[@]}"
        done
        for method in rdskd dafl mskd; do
            row $name$method --teacher-arch $teacher --method $method "${generator[@]}"
        done
        for memory in none vae bank; do
            row ${name}pre-$memory --teacher-arch $teacher --method pre --replay $memory "${generator[@]}"
        done
        name=wrn-40-2- L_bn=1  # of three times as many BatchNorms
    done
    row alexnet-kd --teacher-arch alexnet --method kd "${short[@]}" --batch 64
    for layer in fc2 logits; do
        row alexnet-soft-target-$layer --teacher-arch alexnet --method soft-target --layer $layer "${images[@]}"
    done
}

budget=(--generator-steps 600 --steps 3000)
rdskd=(--method rdskd "${budget[@]}" --ours range)  # without augment, as when the figures were measured
others=(--steps 3000 --ours range)

# robust-rdskd, without a setting, is also the exponential penalty beside claim-sum.
claims() {
    local method setting name
    row claim-sum "${rdskd[@]}" --penalty sum
    row claim-no-oh "${rdskd[@]}" --terms ie ds
    row claim-no-ie "${rdskd[@]}" --terms oh ds
    row claim-no-ds "${rdskd[@]}" --terms oh ie
    row claim-no-range-rdskd --method rdskd "${budget[@]}" --ours
    for method in dafl mskd; do row claim-no-range-$method --method $method --steps 3000 --ours; done
    row claim-no-range-pre-none --method pre --steps 3000 --replay none --ours
    row claim-pre-vae --method pre "${others[@]}"
    row claim-pre-none --method pre "${others[@]}" --replay none
    row claim-pre-no-teacher-term --method pre "${others[@]}" --no-teacher-term
    row claim-pre-no-balanced --method pre "${others[@]}" --no-balanced
    for setting in "" "--latent 50" "--latent 200" "--batch 32" "--batch 128" "--temperature 4" "--temperature 20"; do
        name=${setting:+-${setting//[ -]/}}
        row "robust-rdskd$name" "${rdskd[@]}" $setting
        for method in dafl mskd; do row "robust-$method$name" --method $method "${others[@]}" $setting; done
    done
    for setting in 0.0005 0.002; do
        row robust-rdskd-lr$setting "${rdskd[@]}" --generator-lr $setting
    done
    row robust-rdskd-width32 "${rdskd[@]}" --width 32
    for method in dafl mskd; do
        for setting in 0.01 0.04; do
            row robust-$method-lr$setting --method $method "${others[@]}" --generator-lr $setting
        done
        row robust-$method-width24 --method $method "${others[@]}" --width 24
    done
}

# Of a printed table's rows robust-METHOD-...: of each method, over its settings, mean, deviation and worst
# of the students' mean over the seeds.
over_settings() {
    awk -F' [|] ' '
        match($1, /robust-[a-z]+/) && !seen[$1]++ {  # the first of the tables
            method = substr($1, RSTART, RLENGTH); x = $3 + 0
            n[method]++; sum[method] += x; squares[method] += x * x
            if (n[method] == 1 || x < worst[method]) worst[method] = x
        }
        END {
            for (m in n) if (n[m] > 1) {
                variance = (squares[m] - sum[m] ^ 2 / n[m]) / (n[m] - 1)  # rounding may take 0 below 0
                printf "%s: student %.2f ± %.2f, worst %.2f, over %d settings\n", m, sum[m] / n[m],
                    sqrt(variance > 0 ? variance : 0), worst[m], n[m]
            }
        }' | sort
}

case "${1:-}" in
    test)
        shift
        set_up pytest
        exec "$python" -m pytest -q -p no:cacheprovider test_dfkd.py "$@"
        ;;
    bench)
        set_up pytest
        exec "$python" test_dfkd.py
        ;;
    table | claims)
        data=${2:-} rows=() more=("${@:3}") only_check=""
        case "$1 $data" in "table glyphs") seeds=0 ;; "table mnist") seeds="0 1 2 3 4" ;; "table cifar10") seeds=0 ;;
            "claims mnist" | "claims glyphs") seeds="0 1 2" ;;
            *) fail "./run.sh table needs glyphs, mnist or cifar10; ./run.sh claims needs glyphs or mnist" 2 ;;
        esac
        for word in ${more[@]+"${more[@]}"}; do
            case "${word%%=*}" in --method | --seed | --teacher-seed | --out)
                fail "${word%%=*}: each row of a table has its own; other seeds: SEEDS=\"0 1\" ./run.sh $1 $data" 2 ;;
            esac
        done
        set_up
        check "$1"
        for seed in ${SEEDS:-$seeds}; do "$1"; done
        figures=$("$python" dfkd.py --table "${rows[@]}")
        echo "$figures"
        over_settings <<<"$figures"
        ;;
    "" | -*)
        set_up
        exec "$python" dfkd.py --method rdskd "$@"
        ;;
    *) fail "unknown job '$1'; the jobs are test, bench, table, claims, or none for the main job" 2 ;;
esac
