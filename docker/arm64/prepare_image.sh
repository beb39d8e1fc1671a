#!/bin/sh
# Fills /arm64 of the image (Dockerfile) with the programs and the plugin, and with a root where none was given.
set -eu

cd "$(dirname "$0")"
install_packages() {
    apt-get update
    apt-get install -y --no-install-recommends "$@"
}
command -v gcc >/dev/null || install_packages gcc libc6-dev
if [ ! -e /given/python3.11 ]; then
    install_packages mmdebstrap python3-pip ca-certificates
    # PACKAGES is a list of words.
    sh make_root.sh /arm64 $PACKAGES
fi
mkdir -p /arm64/programs
cp -R . /arm64/programs
gcc -std=c11 -O2 -fPIC -shared -o /arm64/programs/armcount.so armcount.c
chmod 755 /arm64/programs/*.sh
chmod -R a+rX /arm64/programs
