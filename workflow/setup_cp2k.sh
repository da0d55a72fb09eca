#!/usr/bin/env bash
# Find CP2K, or install Debian's package where that needs no password; else say in one line what to do.
set -euo pipefail

for binary in ${HAMSCALE_CP2K:+"${HAMSCALE_CP2K%% *}"} cp2k.psmp cp2k.popt cp2k.ssmp cp2k; do
    if command -v "$binary" > /dev/null; then
        exit 0
    fi
done

if command -v apt-get > /dev/null; then
    if [ "$(id -u)" = 0 ]; then
        as_root=""
    elif sudo -n true 2> /dev/null; then
        as_root="sudo -n"
    else
        as_root="no"
    fi
    if [ "$as_root" != no ]; then
        echo "installing Debian's package cp2k"
        $as_root apt-get update -qq
        DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends cp2k > /dev/null
        exit 0
    fi
fi
echo "CP2K was not found: install the package cp2k (Debian, Ubuntu), or 'conda env create -f envs/cp2k.yaml', or on Alps 'uenv start cp2k'; then try again." >&2
exit 1
