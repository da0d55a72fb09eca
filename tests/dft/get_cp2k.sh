#!/bin/sh
# get_cp2k.sh "SUITE..." DIR "PACKAGE...": unpack CP2K of other Debian suites into DIR, without root; the system stays as it is.
#   tests/dft/get_cp2k.sh trixie DIR "cp2k cp2k-data"                                                   # 2025.1
#   tests/dft/get_cp2k.sh "sid experimental" DIR "cp2k/experimental cp2k-data/experimental libxc15"     # 2026.2
# HAMSCALE_TEST_CP2K=DIR pytest tests/dft/test_versions.py then runs it too (run_cp2k.sh).
set -eu
suites=$1 packages=$3
dir=$(realpath -m "$2")
mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep '/debian/$' | sort -u | head -n 1)
mkdir -p "$dir/apt/lists/partial" "$dir/apt/archives/partial"
: > "$dir/apt/status"
cat > "$dir/apt/conf" << C
Dir::State "$dir/apt"; Dir::State::status "$dir/apt/status"; Dir::State::lists "$dir/apt/lists"; Dir::Cache "$dir/apt";
Dir::Cache::archives "$dir/apt/archives"; Dir::Etc::SourceList "$dir/apt/sources"; Dir::Etc::SourceParts "-"; Dir::Etc::Preferences "-";
Dir::Etc::PreferencesParts "-"; APT::Install-Recommends "false"; Debug::NoLocking "true"; Acquire::Check-Valid-Until "false";
APT::Sandbox::User "";
C
for suite in $suites; do
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
done > "$dir/apt/sources"
export APT_CONFIG="$dir/apt/conf"
apt-get -qq update
apt-get -qq -y --download-only install $packages
for deb in "$dir"/apt/archives/*.deb; do dpkg -x "$deb" "$dir"; done
rm -rf "$dir/apt/archives" "$dir/apt/lists"
