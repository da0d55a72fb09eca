# From config to predicted Hamiltonian. `snakemake --cores 2`, `snakemake --profile alps`, `make demo`.
include: "workflow/hamscale.smk"
include: "workflow/rules/paper.smk"


localrules:
    all,
    figures,


rule all:
    input:
        targets(),
        expand("results/figures/fig{n}.png", n=(3, 5, 6, 7, 8)),
