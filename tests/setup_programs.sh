#!/usr/bin/env bash
# Programs that tests run beside CP2K: Chromium and its driver, in which they open the report and the page, graphviz, which draws the
# graph of rules, mpirun, and Slurm, which they start on this machine. Find them, or install Debian's packages.
set -euo pipefail

if [ "$(id -u)" = 0 ]; then
    as_root=""
else
    as_root="sudo -n"
fi

if ! command -v chromium > /dev/null || ! command -v chromedriver > /dev/null || ! command -v dot > /dev/null; then
    echo "installing Debian's packages chromium, chromium-driver, graphviz"
    if ! { $as_root apt-get update -qq && DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends chromium chromium-driver graphviz > /dev/null; }; then
        echo "Chromium was not found, and not installed: install chromium, chromium-driver and graphviz (Debian, Ubuntu); then try again." >&2
        exit 1
    fi
fi

if ! command -v mpirun > /dev/null; then
    echo "installing Debian's package openmpi-bin"
    if ! { $as_root apt-get update -qq && DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends openmpi-bin > /dev/null; }; then
        echo "mpirun was not found, and not installed: install openmpi-bin (Debian, Ubuntu); then try again." >&2
        exit 1
    fi
fi

if ! command -v slurmctld > /dev/null || ! command -v slurmd > /dev/null || ! command -v srun > /dev/null || ! command -v munged > /dev/null; then
    echo "installing Debian's packages of Slurm"
    if ! $as_root bash "$(dirname "$0")/slurm/lab.sh" install; then
        echo "Slurm was not found, and not installed: the packages are those of tests/slurm/lab.sh (Debian); then try again." >&2
        exit 1
    fi
fi
