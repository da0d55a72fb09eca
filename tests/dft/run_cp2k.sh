#!/bin/sh
# run_cp2k.sh [-n RANKS] ARGUMENTS: run the CP2K that get_cp2k.sh unpacked into $HAMSCALE_TEST_CP2K, by its own loader and libraries.
root=${HAMSCALE_TEST_CP2K:?the folder of get_cp2k.sh}
lib=$root/usr/lib/x86_64-linux-gnu
more="$lib/blas:$lib/lapack:$lib/openblas-pthread:$lib/openblas0-pthread:$lib/pmix2/lib:$lib/openmpi/lib:$lib/prrte/lib"
export OPAL_PREFIX="$root/usr" PMIX_PREFIX="$root/usr" PRTE_PREFIX="$root/usr"
export CP2K_DATA_DIR="${CP2K_DATA_DIR:-$root/usr/share/cp2k}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
program="$root/usr/bin/cp2k.psmp"
if [ "$1" = -n ]; then
    ranks=$2
    shift 2
    set -- --allow-run-as-root --map-by :OVERSUBSCRIBE -n "$ranks" "$0" "$@"
    program="$root/usr/bin/prterun"
fi
exec "$lib/ld-linux-x86-64.so.2" --library-path "$lib:$more" "$program" "$@"
