#!/bin/sh
# prepared.sh MATERIAL SOURCE OUT: copy a structure, or its CP2K input, from a folder that `hamscale prepare` fills with those of
# the whole material, the first time that one is missing there or older than the file it is made from. Reading CP2K's grammar
# takes seconds, and each structure then milliseconds. The folder is named after the content of MATERIAL, so it holds no others.
# It is no output of a rule: Snakemake would make every structure anew when there is one more.
set -e
material=$1 source=$2 out=$3
folder=$(dirname "$(dirname "$out")")/prepared/$(sha256sum < "$material" | cut -c1-12)
mkdir -p "$folder"
exec 9> "$folder/lock"
flock 9
prepared=$folder/$(basename "$out")
# a structure without a source has an empty one, which no shell finds newer than a file
if [ ! -e "$prepared" ] || [ "$source" -nt "$prepared" ]; then hamscale prepare "$material" --out "$folder"; fi
cp "$prepared" "$out"
