# Structures that take milliseconds, and their CP2K inputs, are all written by one process, which reads CP2K's grammar once.
# Each is then copied by a job of its own, which its own recipe alone makes stale: a structure added to a material runs CP2K once
# more.
rule prepare:
    input:
        lambda w: [
            s.file.path for s in MATERIALS[w.material].quick_sets().values() if s.file
        ],
    output:
        directory("results/{material}/prepared"),
    log:
        "logs/{material}/prepared.log",
    conda:
        "../../envs/hamscale.yaml"
    params:
        file="config/materials/{material}.yaml",
        settings=settings("structures", "dft", "species"),
    message:
        "build structures and write CP2K inputs: {wildcards.material}"
    shell:
        "hamscale prepare {params.file} --out {output} > {log} 2>&1"


rule structure:
    input:
        source_file,
        prepared=ancient(prepared_folder),
    output:
        "results/{material}/structures/{id}.extxyz",
    log:
        "logs/{material}/structures/{id}.log",
    conda:
        "../../envs/hamscale.yaml"
    params:
        recipe=recipe,
        make=prepared_or("hamscale structure {file} --id {id} {tile} --out"),
    message:
        "build the structure {wildcards.material} {wildcards.id}"
    shell:
        "{params.make} {output} > {log} 2>&1"


rule input:
    input:
        structure="results/{material}/structures/{id}.extxyz",
        prepared=ancient(prepared_folder),
    output:
        "results/{material}/inputs/{id}.inp",
    log:
        "logs/{material}/inputs/{id}.log",
    conda:
        "../../envs/hamscale.yaml"
    params:
        settings=settings("dft", "species"),
        make=prepared_or("hamscale input {file} {structure} --out"),
    message:
        "write the CP2K input of {wildcards.material} {wildcards.id}"
    shell:
        "{params.make} {output} > {log} 2>&1"


# Of a set made by melt and quench: is it a good one?
rule quality:
    input:
        lambda w: expand(
            "results/{material}/structures/{id}.extxyz",
            material=w.material,
            id=[
                i
                for i in MATERIALS[w.material].identifiers()
                if i.rsplit("-", 1)[0] == w.set
            ],
        ),
    output:
        distribution="results/{material}/quality/{set}/distribution.csv",
        coordination="results/{material}/quality/{set}/coordination.csv",
        pdf="results/{material}/quality/{set}/quality.pdf",
        png=report(
            "results/{material}/quality/{set}/quality.png",
            caption="../report/quality.rst",
            category="{material}",
            subcategory="{set}",
            labels={"what": "radial distribution, coordination"},
        ),
    log:
        "logs/{material}/quality/{set}.log",
    conda:
        "../../envs/hamscale.yaml"
    params:
        out=output_folder,
    message:
        "density, radial distribution, coordination: {wildcards.material} {wildcards.set}"
    shell:
        "hamscale quality {input} --out {params.out} > {log} 2>&1"
