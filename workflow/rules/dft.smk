rule dft:
    input:
        "results/{material}/inputs/{id}.inp",
    output:
        directory("results/{material}/dft/{id}"),
    log:
        "logs/{material}/dft/{id}.log",
    conda:
        "../../envs/cp2k.yaml"
    threads: 1
    message:
        "CP2K: {wildcards.material} {wildcards.id}"
    shell:
        "OMP_NUM_THREADS={threads} hamscale dft {input} --out {output} > {log} 2>&1"


rule operators:
    input:
        structure="results/{material}/structures/{id}.extxyz",
        run="results/{material}/dft/{id}",
    output:
        "results/{material}/operators/{id}.h5",
    log:
        "logs/{material}/operators/{id}.log",
    conda:
        "../../envs/hamscale.yaml"
    params:
        file="config/materials/{material}.yaml",
        settings=settings("species"),
    message:
        "parse H and S: {wildcards.material} {wildcards.id}"
    shell:
        "hamscale operators {params.file} {input.structure} {input.run} --out {output} > {log} 2>&1"
