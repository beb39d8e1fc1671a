#!/bin/sh
# The Python of the arm64 root, run as it is: on Arm by the processor, elsewhere by an emulator that the kernel knows
# (binfmt_misc). Its libraries are the root's, whatever the rest of the image is.
root=/arm64/root
export PYTHONHOME=$root/usr PYTHONPATH=$root/opt/site PYTHONDONTWRITEBYTECODE=1
exec $root/lib/ld-linux-aarch64.so.1 --library-path $root/lib/aarch64-linux-gnu:$root/usr/lib/aarch64-linux-gnu \
    --argv0 $root/usr/bin/python3.11 $root/usr/bin/python3.11 "$@"
