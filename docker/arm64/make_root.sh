#!/bin/sh
# Builds a Debian root for 64-bit Arm with Python, and the runtimes that models are run with, without executing anything
# of it: no emulator and no special rights are needed, only the network.
#
#   make_root.sh DIR onnxruntime==1.31.1 numpy==2.4.6 ai-edge-litert==2.3.0
#
# DIR must not exist. DIR/root is made the root, DIR/cortex-a72 and so on what each core sees of it (link_cores.sh).
# Packages are wheels for the Python of that Debian (3.11), installed without their dependencies into opt/site.
# PIP names the pip to use ("python3 -m pip"), MIRROR another Debian mirror.
set -eu

folder=$1
root=$folder/root
shift
mkdir -p "$folder"
mkdir "$root"
# Through a tar file, so that nothing has to belong to root and nothing has to be mounted.
mmdebstrap --quiet --variant=extract --architectures=arm64 --format=tar \
    --include=python3.11-minimal,libpython3.11-stdlib,libgomp1,libstdc++6 bookworm - ${MIRROR:+"$MIRROR"} >"$root.tar"
tar --extract --file "$root.tar" --directory "$root" --no-same-owner --exclude './dev/*' --exclude './usr/share/doc'
rm "$root.tar"

${PIP:-python3 -m pip} install --quiet --disable-pip-version-check --target "$root/opt/site" --python-version 3.11 \
    --implementation cp --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 --only-binary=:all: --no-compile --no-deps "$@"

sh "$(dirname "$0")/link_cores.sh" "$folder"
