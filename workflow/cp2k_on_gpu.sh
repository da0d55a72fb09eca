#!/usr/bin/env bash
# A rank of CP2K on a node with GPUs:  srun ... --cpu-bind=socket workflow/cp2k_on_gpu.sh cp2k.psmp ARGUMENTS
# All ranks of a run share the GPU of the socket they are bound to, through NVIDIA's MPS, as docs.cscs.ch/software/sciapps/cp2k has it.
# On a node without GPUs it only starts the program.
set -euo pipefail
ulimit -s unlimited || ulimit -s "$(ulimit -H -s)"
export MPICH_MALLOC_FALLBACK=1 MPICH_GPU_SUPPORT_ENABLED="${MPICH_GPU_SUPPORT_ENABLED:-1}"
if command -v nvidia-cuda-mps-control > /dev/null; then
    own="${TMPDIR:-/dev/shm}/$(id -un)" # one folder for all runs of the node
    mkdir -p "$own"
    export CUDA_MPS_PIPE_DIRECTORY="$own/mps" CUDA_MPS_LOG_DIRECTORY="$own/mps-log" CUDA_CACHE_PATH="$own/cuda_cache"
    if [ "${SLURM_LOCALID:-0}" = 0 ]; then
        # one daemon for all runs of the node: a second start fails, and it is not stopped under the others, but ends with the job
        CUDA_VISIBLE_DEVICES=0,1,2,3 nvidia-cuda-mps-control -d > /dev/null 2>&1 || true
    fi
    CUDA_VISIBLE_DEVICES=$(hwloc-calc --physical --intersect NUMAnode "$(hwloc-bind --get --taskset)")
    export CUDA_VISIBLE_DEVICES
    sleep 1 # the daemon starts
fi
exec "$@"
