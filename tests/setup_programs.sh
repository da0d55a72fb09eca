#!/usr/bin/env bash
# Chromium and its driver, in which tests open the report and the page, and graphviz, which draws the graph of rules: find them, or
# install Debian's packages.
set -euo pipefail

if command -v chromium > /dev/null && command -v chromedriver > /dev/null && command -v dot > /dev/null; then
    exit 0
fi
if command -v apt-get > /dev/null; then
    as_root=""
    if [ "$(id -u)" != 0 ]; then
        as_root="sudo -n"
    fi
    echo "installing Debian's packages chromium, chromium-driver, graphviz"
    if $as_root apt-get update -qq && DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends chromium chromium-driver graphviz > /dev/null; then
        exit 0
    fi
fi
echo "Chromium was not found, and not installed: install chromium, chromium-driver and graphviz (Debian, Ubuntu); then try again." >&2
exit 1
