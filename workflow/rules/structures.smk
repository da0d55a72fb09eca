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
        recipe=recipe,
        make=prepared_or("hamscale structure {file} --id {id} {tile} --out"),
    message:
        "build the structure {wildcards.material} {wildcards.id}"
    shell:
        "{params.make} {output} > {log} 2>&1"


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
