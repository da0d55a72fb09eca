rule reference:
    input:
        of_split("results/{owner}/operators/{id}.h5", "train"),
    output:
        "results/{material}/reference.h5",
    log:
        "logs/{material}/reference.log",
    conda:
        "../../envs/hamscale.yaml"
    params:
        file="config/materials/{material}.yaml",
        settings=settings("graph"),
    message:
        "fit gauge, reference and scales: {wildcards.material}"
    shell:
        "hamscale reference {params.file} {input} --out {output} > {log} 2>&1"


# All graphs of a material in one process: another reference is another graph of every structure.
rule graphs:
    input:
        reference="results/{material}/reference.h5",
        operators=of_split("results/{owner}/operators/{id}.h5", "train", "validation"),
    output:
        directory("results/{material}/graphs"),
    log:
        "logs/{material}/graphs.log",
    conda:
        "../../envs/hamscale.yaml"
    message:
        "graphs and targets: {wildcards.material}"
    shell:
        "hamscale graph {input.reference} {input.operators} --out {output} > {log} 2>&1"


# For looking, and for training on a partition of one's own: snakemake results/hfo2/partitions/train-000-min-nn-8.h5
rule partition:
    input:
        structure=of_owner("results/{material}/structures/{id}.extxyz"),
        reference="results/{material}/reference.h5",
    output:
        "results/{material}/partitions/{id}-{method}-{parts}.h5",
    log:
        "logs/{material}/partitions/{id}-{method}-{parts}.log",
    conda:
        "../../envs/hamscale.yaml"
    message:
        "partition {wildcards.id} into {wildcards.parts}: {wildcards.method}"
    shell:
        "hamscale partition {input.structure} --reference {input.reference} --parts {wildcards.parts}"
        " --method {wildcards.method} --out {output} > {log} 2>&1"
