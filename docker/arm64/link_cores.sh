#!/bin/sh
# Gives every core its own view of an arm64 root: links to DIR/root, and a /proc/cpuinfo that names the core. Runtimes choose
# their kernels by it (onnxruntime does not even start without it). A program of the core cortex-a72 is run with
#   qemu-aarch64 -L DIR/cortex-a72 DIR/cortex-a72/usr/bin/python3.11
#
#   link_cores.sh DIR
set -eu

for cpuinfo in "$(dirname "$0")"/cpuinfo/*; do
    view=$1/$(basename "$cpuinfo")
    mkdir -p "$view/proc" "$view/sys/devices/system/cpu"
    cp "$cpuinfo" "$view/proc/cpuinfo"
    for list in possible present online kernel_max; do # one core, whatever the host has
        echo 0 >"$view/sys/devices/system/cpu/$list"
    done
    for path in "$1"/root/*; do
        name=$(basename "$path")
        case $name in
        proc | sys | dev | tmp) ;; # the host's
        *) ln -sfn "../root/$name" "$view/$name" ;;
        esac
    done
done
