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
        settings=settings("graph", "prediction"),
    message:
        "fit gauge, reference and scales: {wildcards.material}"
    shell:
        "hamscale reference {params.file} {input} --out {output} > {log} 2>&1"


# All graphs of a material in one process: another reference is another graph of every structure.
rule graphs:
    input:
        reference="results/{material}/reference.h5",
        operators=of_split("results/{owner}/operators/{id}.h5", "train", "validation"),
        taught=taught,
    output:
        directory("results/{material}/graphs"),
    log:
        "logs/{material}/graphs.log",
    conda:
        "../../envs/hamscale.yaml"
    message:
        "graphs and targets: {wildcards.material}"
    shell:
        "hamscale graph {input.reference} {input.operators} {input.taught} --out {output} > {log} 2>&1"


# What a teacher says of structures that have no DFT, its charges made self-consistent.
rule teach:
    input:
        weights=lambda w: f"{MATERIALS[w.material].prediction.teacher}/weights.safetensors",
        structure=of_owner("results/{material}/structures/{id}.extxyz"),
    output:
        "results/{material}/taught/{id}.h5",
    log:
        "logs/{material}/taught/{id}.log",
    conda:
        "../../envs/hamscale.yaml"
    threads: 2
    params:
        model=input_folder,
        file="config/materials/{material}.yaml",
    message:
        "H with self-consistent charges, to be learnt: {wildcards.material} {wildcards.id}"
    shell:
        "hamscale predict {params.model} {input.structure} --material {params.file} --self-consistent --out {output}"
        " > {log} 2>&1"


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
