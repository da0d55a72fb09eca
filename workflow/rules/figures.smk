rule plot_structure:
    input:
        tables=rules.analyse.output,
        train="results/{material}/models/{model}/train.csv",
    output:
        pdf=expand(
            "results/figures/{{material}}/{{model}}/{{id}}/{figure}.pdf",
            figure=FIGURES,
        ),
        bands=report(
            "results/figures/{material}/{model}/{id}/bands.png",
            caption="../report/bands.rst",
            category="{material}",
            subcategory="{id}",
            labels={"what": "bands", "model": "{model}"},
        ),
        dos=report(
            "results/figures/{material}/{model}/{id}/dos.png",
            caption="../report/dos.rst",
            category="{material}",
            subcategory="{id}",
            labels={"what": "dos", "model": "{model}"},
        ),
        error_by_pair=report(
            "results/figures/{material}/{model}/{id}/error_by_pair.png",
            caption="../report/error_by_pair.rst",
            category="{material}",
            subcategory="{id}",
            labels={"what": "error by pair", "model": "{model}"},
        ),
        error_by_distance=report(
            "results/figures/{material}/{model}/{id}/error_by_distance.png",
            caption="../report/error_by_distance.rst",
            category="{material}",
            subcategory="{id}",
            labels={"what": "error by distance", "model": "{model}"},
        ),
        decay=report(
            "results/figures/{material}/{model}/{id}/decay.png",
            caption="../report/decay.rst",
            category="{material}",
            subcategory="{id}",
            labels={"what": "decay", "model": "{model}"},
        ),
        heatmap=report(
            "results/figures/{material}/{model}/{id}/heatmap.png",
            caption="../report/heatmap.rst",
            category="{material}",
            subcategory="{id}",
            labels={"what": "heatmap", "model": "{model}"},
        ),
        slabs=report(
            "results/figures/{material}/{model}/{id}/slabs.png",
            caption="../report/slabs.rst",
            category="{material}",
            subcategory="{id}",
            labels={"what": "slabs", "model": "{model}"},
        ),
        training=report(
            "results/figures/{material}/{model}/{id}/training.png",
            caption="../report/training.rst",
            category="{material}",
            subcategory="{id}",
            labels={"what": "training", "model": "{model}"},
        ),
    log:
        "logs/{material}/figures/{model}/{id}.log",
    conda:
        "../../envs/hamscale.yaml"
    params:
        analysis=input_folder,
        out=output_folder,
    message:
        "figures: {wildcards.material} {wildcards.id}"
    shell:
        "hamscale plot-structure {params.analysis} {input.train} --out {params.out} > {log} 2>&1"


# Where `analyse` was asked for T(E), it writes transmission.csv beside its other tables
rule plot_transmission:
    input:
        tables=tables_with_transmission,
    output:
        pdf="results/figures/{material}/{model}/{id}/transmission.pdf",
        png=report(
            "results/figures/{material}/{model}/{id}/transmission.png",
            caption="../report/transmission.rst",
            category="{material}",
            subcategory="{id}",
            labels={"what": "transmission", "model": "{model}"},
        ),
    log:
        "logs/{material}/figures/{model}/{id}-transmission.log",
    conda:
        "../../envs/hamscale.yaml"
    params:
        analysis=input_folder,
        out=output_folder,
    message:
        "transmission: {wildcards.material} {wildcards.id}"
    shell:
        "hamscale plot-transmission {params.analysis}/transmission.csv --out {params.out} > {log} 2>&1"


rule index:
    input:
        summaries,
        views,
    output:
        "results/index.html",
    log:
        "logs/index.log",
    conda:
        "../../envs/hamscale.yaml"
    message:
        "one page of all materials"
    shell:
        "hamscale index --out {output} > {log} 2>&1"
