# A job per structure: a structure added to a material makes no other run of CP2K stale.
rule structure:
    input:
        source_file,
    output:
        "results/{material}/structures/{id}.extxyz",
    log:
        "logs/{material}/structures/{id}.log",
    conda:
        "../../envs/hamscale.yaml"
    params:
        file="config/materials/{material}.yaml",
        recipe=recipe,
        tile=tile_option,
    message:
        "build the structure {wildcards.material} {wildcards.id}"
    shell:
        "hamscale structure {params.file} --id {wildcards.id} {params.tile} --out {output} > {log} 2>&1"


rule input:
    input:
        "results/{material}/structures/{id}.extxyz",
    output:
        "results/{material}/inputs/{id}.inp",
    log:
        "logs/{material}/inputs/{id}.log",
    conda:
        "../../envs/hamscale.yaml"
    params:
        file="config/materials/{material}.yaml",
        settings=settings("dft", "species"),
    message:
        "write the CP2K input of {wildcards.material} {wildcards.id}"
    shell:
        "hamscale input {params.file} {input} --out {output} > {log} 2>&1"
