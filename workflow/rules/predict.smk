rule predict:
    input:
        weights="results/{material}/models/{model}/weights.safetensors",
        structure=of_owner("results/{material}/structures/{id}.extxyz"),
        overlap=overlap_of,
    output:
        "results/{material}/predicted/{model}/{id}.h5",
    log:
        "logs/{material}/predicted/{model}/{id}.log",
    conda:
        "../../envs/hamscale.yaml"
    threads: 2
    resources:
        launch="",
        exchange="torch",
    params:
        model=input_folder,
        file="config/materials/{material}.yaml",
        options=options_of_prediction,
    message:
        "predict H and S: {wildcards.material} {wildcards.id}"
    shell:
        "OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}} {resources.launch}"
        " hamscale predict {params.model} {input.structure} --material {params.file} {params.options} --out {output}"
        " --exchange {resources.exchange} > {log} 2>&1"


rule export:
    input:
        "results/{material}/predicted/{model}/{id}.h5",
    output:
        directory("results/{material}/export/{model}/{id}/{target}"),
    log:
        "logs/{material}/export/{model}/{id}/{target}.log",
    wildcard_constraints:
        target="quatrex|deeph|deeptb|cp2k|cp2k-text|matrixmarket",
    conda:
        "../../envs/hamscale.yaml"
    message:
        "export to {wildcards.target}: {wildcards.material} {wildcards.id}"
    shell:
        "hamscale export {input} --to {wildcards.target} --out {output} > {log} 2>&1"


rule export_sisl:
    input:
        "results/{material}/predicted/{model}/{id}.h5",
    output:
        "results/{material}/export/{model}/{id}/hamiltonian.{suffix}",
    log:
        "logs/{material}/export/{model}/{id}/{suffix}.log",
    wildcard_constraints:
        suffix="nc|TSHS",
    conda:
        "../../envs/hamscale.yaml"
    message:
        "export to {wildcards.suffix}: {wildcards.material} {wildcards.id}"
    shell:
        "hamscale export {input} --to sisl --out {output} > {log} 2>&1"


rule baseline:
    input:
        weights="results/{material}/models/{model}/weights.safetensors",
        structure=of_owner("results/{material}/structures/{id}.extxyz"),
        overlap=overlap_of,
    output:
        "results/{material}/predicted/{model}/reference-only/{id}.h5",
    log:
        "logs/{material}/predicted/{model}/reference-only/{id}.log",
    conda:
        "../../envs/hamscale.yaml"
    params:
        model=input_folder,
        file="config/materials/{material}.yaml",
        overlap=overlap_option,
    message:
        "reference alone: {wildcards.material} {wildcards.id}"
    shell:
        "hamscale predict {params.model} {input.structure} --material {params.file} {params.overlap} --out {output} --reference-only"
        " > {log} 2>&1"


rule analyse:
    input:
        dft=of_owner("results/{material}/operators/{id}.h5"),
        predicted="results/{material}/predicted/{model}/{id}.h5",
        baseline="results/{material}/predicted/{model}/reference-only/{id}.h5",
    output:
        expand(
            "results/{{material}}/analysis/{{model}}/{{id}}/{table}.csv",
            table=(
                "summary",
                "by_pair",
                "by_distance",
                "blocks",
                "decay",
                "bands",
                "dos",
                "heatmap",
                "slabs",
            ),
        ),
        errors=report(
            "results/{material}/analysis/{model}/{id}/errors.html",
            caption="../report/errors.rst",
            category="{material}",
            subcategory="{id}",
            labels={"what": "table of errors", "model": "{model}"},
        ),
    log:
        "logs/{material}/analysis/{model}/{id}.log",
    conda:
        "../../envs/hamscale.yaml"
    params:
        file="config/materials/{material}.yaml",
        settings=settings_of_analysis,
        out=output_folder,
    message:
        "errors, bands and DOS: {wildcards.material} {wildcards.id}"
    shell:
        "hamscale analyse {params.file} --dft {input.dft} --predicted {input.predicted} --baseline {input.baseline}"
        " --out {params.out} > {log} 2>&1"


# Of what DFT cannot do as well: atoms, their parts, |H| as an image
rule view:
    input:
        "results/{material}/predicted/{model}/{id}.h5",
    output:
        expand(
            "results/{{material}}/analysis/{{model}}/{{id}}/{table}.csv",
            table=("atoms", "parts", "image"),
        ),
    log:
        "logs/{material}/view/{model}/{id}.log",
    conda:
        "../../envs/hamscale.yaml"
    params:
        out=output_folder,
    message:
        "atoms, parts and H of {wildcards.material} {wildcards.id}"
    shell:
        "hamscale view {input} --out {params.out} > {log} 2>&1"


# Of a device without DFT; of others `analyse` computes it beside DFT's
rule transmission:
    input:
        "results/{material}/predicted/{model}/{id}.h5",
    output:
        "results/{material}/analysis/{model}/{id}/transmission.csv",
    log:
        "logs/{material}/transmission/{model}/{id}.log",
    conda:
        "../../envs/hamscale.yaml"
    threads: 2
    params:
        options=options_of_transmission,
    message:
        "transmission of {wildcards.material} {wildcards.id}"
    shell:
        "OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}}"
        " hamscale transmission {input} {params.options} --out {output} > {log} 2>&1"


rule summary:
    input:
        summaries,
    output:
        csv="results/summary.csv",
        html=report(
            "results/summary.html",
            caption="../report/summary.rst",
            category="Summary",
            labels={"what": "table of errors, all structures"},
        ),
    log:
        "logs/summary.log",
    conda:
        "../../envs/hamscale.yaml"
    message:
        "join the summaries"
    shell:
        "hamscale summary {input} --out {output.csv} > {log} 2>&1"
