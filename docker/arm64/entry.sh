#!/bin/sh
# What the image runs: one inference after the other of each file on an emulated core.
#   CORE [OPTION]... FILE...
# CORE is cortex-a53, cortex-a55, cortex-a72 or cortex-a76; options are those of bench.py. What one inference executes is
# printed for each file. COUNTS names a file for the raw counts of the plugin in the place of this summary, LIMIT the seconds
# after which everything is ended.
set -eu

usage() {
    sed -n '2,6s/^# *//p' "$0" >&2
    exit 2
}
[ $# -ge 2 ] || usage
core=$1
shift
case $core in # the same as in arm_cores.py
cortex-a53) cpu=cortex-a53 caches=l1=32:4,l2=512:16 ;;
cortex-a55) cpu=cortex-a76 caches=l1=32:4,l2=512:16 ;;
cortex-a72) cpu=cortex-a72 caches=l1=32:2,l2=1024:16 ;;
cortex-a76) cpu=cortex-a76 caches=l1=64:4,l2=512:8 ;;
*) usage ;;
esac
programs=/arm64/programs
root=/arm64/$core
python="$root/usr/bin/python3.11 -s -S -B"
[ -s "$root/proc/cpuinfo" ] || {
    echo "the image has no $root/proc/cpuinfo, without which runtimes crash: build it anew" >&2
    exit 3
}

# All that programs in the guest see of an environment: counts depend on it.
emulate() {
    env -i PATH=/usr/bin:/bin HOME=/ LANG=C.UTF-8 OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 PYTHONHASHSEED=0 \
        PYTHONPATH="$root/opt/site" timeout -k 5 "${LIMIT:-3600}" qemu-aarch64 -seed 1 -cpu "$cpu" -L "$root" "$@"
}
if [ -n "${COUNTS:-}" ]; then
    emulate -plugin "$programs/armcount.so,out=$COUNTS,$caches" $python $programs/bench.py --marks "$@"
else
    counts=$(mktemp)
    printed=$(mktemp)
    emulate -plugin "$programs/armcount.so,out=$counts,$caches" $python $programs/bench.py --marks "$@" >"$printed"
    emulate $python $programs/summarize.py "$core" "$printed" "$counts"
fi
