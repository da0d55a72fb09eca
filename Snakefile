# From config to predicted Hamiltonian. `snakemake --cores 2`, `snakemake --profile alps`, `make demo`.
from snakemake.utils import min_version

min_version("9.10")


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/structures.smk"
include: "workflow/rules/dft.smk"
include: "workflow/rules/dataset.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/predict.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/paper.smk"


# seconds each: they run where Snakemake runs
localrules:
    all,
    structure,
    input,
    operators,
    reference,
    graphs,
    partition,
    view,
    quality,
    plot_structure,
    summary,
    figures,
    index,


rule all:
    input:
        "results/summary.csv",
        "results/index.html",
        expand("results/figures/fig{n}.png", n=(3, 5, 6, 7, 8)),
        [
            target
            for run in RUNS
            for target in predictions(run)
            + figures(run)
            + exports(run)
            + qualities(run)
        ],
