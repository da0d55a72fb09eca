# The paper's figures, drawn from tables: those committed under resources/raw, or, with --config raw=results/raw, measured here anew.
RAW_TABLES = [
    "fig3.csv",
    "fig5_domains.csv",
    "partition.csv",
    "topology.csv",
    "scaling_measured.csv",
    "scaling_node_update.csv",
    "scaling_modelled.csv",
    *(f"fig8_{table}.csv" for table in FIGURE_8_TABLES),
    "ablation_hfo2.csv",
    "ablation_gst124.csv",
    "size.csv",
    "roofline.csv",
    "roofline_rates.csv",
    "dos_cell_1008-000.csv",
    "dos_tiled-000.csv",
]


rule figures:
    input:
        expand("{raw}/{table}", raw=CONFIG.raw, table=RAW_TABLES),
    output:
        pdf=expand(
            "results/figures/{name}.pdf",
            name=(
                "fig3",
                "fig5",
                "fig6",
                "fig7",
                "fig8",
                "learning",
                "roofline",
                "size",
            ),
        ),
        fig3=report(
            "results/figures/fig3.png",
            caption="../report/fig3.rst",
            category="Figures of the method",
            labels={"what": "figure 3"},
        ),
        fig5=report(
            "results/figures/fig5.png",
            caption="../report/fig5.rst",
            category="Figures of the method",
            labels={"what": "figure 5"},
        ),
        fig6=report(
            "results/figures/fig6.png",
            caption="../report/fig6.rst",
            category="Figures of the method",
            labels={"what": "figure 6"},
        ),
        fig7=report(
            "results/figures/fig7.png",
            caption="../report/fig7.rst",
            category="Figures of the method",
            labels={"what": "figure 7"},
        ),
        fig8=report(
            "results/figures/fig8.png",
            caption="../report/fig8.rst",
            category="Figures of the method",
            labels={"what": "figure 8"},
        ),
        learning=report(
            "results/figures/learning.png",
            caption="../report/learning.rst",
            category="Figures of the method",
            labels={"what": "errors against structures, steps and variants"},
        ),
        roofline=report(
            "results/figures/roofline.png",
            caption="../report/roofline.rst",
            category="Figures of the method",
            labels={"what": "what a GPU could do at best"},
        ),
        size=report(
            "results/figures/size.png",
            caption="../report/size.rst",
            category="Figures of the method",
            labels={"what": "time and memory against edges"},
        ),
    log:
        "logs/figures.log",
    conda:
        "../../envs/hamscale.yaml"
    params:
        raw=input_folder,
    message:
        "figures 3 and 5 to 8, learning, roofline, size"
    shell:
        "hamscale plot-paper --raw {params.raw} --out results/figures > {log} 2>&1"


# Measured on the device that a profile names, started by its `launch`: docs/alps.md
rule throughput:
    output:
        "results/raw/fig3.csv",
    log:
        "logs/raw/throughput.log",
    conda:
        "../../envs/hamscale.yaml"
    resources:
        launch="",
        device="cpu",
    message:
        "measure messages per second"
    shell:
        "{resources.launch} python benchmarks/throughput.py --device {resources.device} --raw results/raw > {log} 2>&1"


# Counted and modelled, so it is the same on every machine.
rule roofline:
    output:
        "results/raw/launches.csv",
        "results/raw/roofline.csv",
        "results/raw/roofline_rates.csv",
    log:
        "logs/raw/roofline.log",
    conda:
        "../../envs/hamscale.yaml"
    message:
        "count operations, model GPUs"
    shell:
        "python benchmarks/launches.py --raw results/raw > {log} 2>&1"


rule domains:
    output:
        "results/raw/fig5_domains.csv",
        "results/raw/partition_ranks.csv",
        "results/raw/topology.csv",
    log:
        "logs/raw/domains.log",
    conda:
        "../../envs/hamscale.yaml"
    message:
        "parts of 24,000 atoms, by rank"
    shell:
        "python benchmarks/domains.py --raw results/raw > {log} 2>&1"


rule partition_table:
    output:
        "results/raw/partition.csv",
    log:
        "logs/raw/partition.log",
    conda:
        "../../envs/hamscale.yaml"
    message:
        "quality of partitions"
    shell:
        "python benchmarks/partition.py --csv {output} > {log} 2>&1"


rule scaling_measured:
    output:
        "results/raw/scaling_measured.csv",
        "results/raw/scaling_machine.json",
    log:
        "logs/raw/scaling_measured.log",
    conda:
        "../../envs/hamscale.yaml"
    threads: 2
    resources:
        launch="",
        device="cpu",
        sizes="",
    message:
        "measure scaling over ranks"
    shell:
        "{resources.launch} python benchmarks/scaling.py measure --device {resources.device} {resources.sizes}"
        " --raw results/raw > {log} 2>&1"


rule scaling_partitions:
    output:
        "results/raw/scaling_partitions.csv",
    log:
        "logs/raw/scaling_partitions.log",
    conda:
        "../../envs/hamscale.yaml"
    message:
        "exact counts up to 8,192 ranks"
    shell:
        "python benchmarks/scaling.py partitions --raw results/raw > {log} 2>&1"


rule scaling_modelled:
    input:
        "results/raw/fig3.csv",
        "results/raw/partition_ranks.csv",
        "results/raw/scaling_machine.json",
        "results/raw/scaling_partitions.csv",
    output:
        "results/raw/scaling_modelled.csv",
        "results/raw/scaling_node_update.csv",
        "results/raw/scaling_paper.csv",
    log:
        "logs/raw/scaling_modelled.log",
    conda:
        "../../envs/hamscale.yaml"
    message:
        "model scaling over more ranks than there are"
    shell:
        "python benchmarks/scaling.py model --raw results/raw > {log} 2>&1"


rule size_table:
    output:
        "results/raw/size.csv",
    log:
        "logs/raw/size.log",
    conda:
        "../../envs/hamscale.yaml"
    threads: 2
    message:
        "time and memory of predictions, up to 24,000 atoms"
    shell:
        "python benchmarks/size.py --out {output} > {log} 2>&1"


# Of GeSb2Te4, 1,008 atoms, of which all eigenvalues are found too, and tiled to 8,064, by the network that is shipped.
rule dos_table:
    input:
        structure="results/gst124/structures/{id}.extxyz",
        model=multiext(
            "resources/models/gst124/",
            "config.json",
            "reference.h5",
            "weights.safetensors",
        ),
    output:
        table="results/raw/dos_{id}.csv",
        operators=temp("results/raw/dos_{id}.h5"),
    log:
        "logs/raw/dos_{id}.log",
    conda:
        "../../envs/hamscale.yaml"
    threads: 2
    params:
        model=lambda w, input: str(Path(input.model[0]).parent),
        exact=lambda w: "--exact" if w.id == "cell_1008-000" else "",
    message:
        "density of states: {wildcards.id}"
    shell:
        "hamscale predict {params.model} {input.structure} --out {output.operators} > {log} 2>&1 &&"
        " hamscale dos {output.operators} --clusters 120 --radius 12 {params.exact} --out {output.table} >> {log} 2>&1"


rule ablation:
    input:
        lambda w: expand(
            "results/{material}/operators/{id}.h5",
            material=w.material,
            id=[
                id
                for id in MATERIALS[w.material].identifiers(
                    "train", "validation", "test"
                )
                if not MATERIALS[w.material].structures[id[:-4]].melt_quench
            ],
        ),
    output:
        "results/raw/ablation_{material}.csv",
    log:
        "logs/raw/ablation_{material}.log",
    conda:
        "../../envs/hamscale.yaml"
    message:
        "what each part of the training is worth: {wildcards.material}"
    shell:
        "python benchmarks/ablation.py {wildcards.material} --out {output} > {log} 2>&1"


# Of the material that the configuration names under figure_8: snakemake results/raw/fig8_summary.csv --configfile config/figures.yaml
if CONFIG.figure_8:

    rule paper_tables:
        input:
            analysis=figure_8_files(CONFIG.figure_8.structures, *FIGURE_8_TABLES[:-2]),
            view=figure_8_files(CONFIG.figure_8.tiled, *FIGURE_8_TABLES[-2:]),
        output:
            expand("results/raw/fig8_{table}.csv", table=FIGURE_8_TABLES),
        log:
            "logs/raw/figure_8.log",
        localrule: True
        conda:
            "../../envs/hamscale.yaml"
        params:
            labels=[*CONFIG.figure_8.structures, *CONFIG.figure_8.tiled],
            analysis=lambda w, input: list(
                dict.fromkeys(str(Path(f).parent) for f in input.analysis)
            ),
            view=lambda w, input: str(Path(input.view[0]).parent),
        message:
            "tables of figure 8"
        shell:
            "hamscale paper-tables --label {params.labels:q} --analysis {params.analysis} --view {params.view}"
            " --out results/raw > {log} 2>&1"
