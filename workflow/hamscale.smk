# The rules from a material to its predicted Hamiltonian, for the Snakefile beside this folder, and for those of `hamscale init`.
from snakemake.utils import min_version

min_version("9.10")


configfile: "config/config.yaml"


report: "report/workflow.rst"


include: "rules/common.smk"
include: "rules/structures.smk"
include: "rules/dft.smk"
include: "rules/dataset.smk"
include: "rules/train.smk"
include: "rules/predict.smk"
include: "rules/figures.smk"


onsuccess:
    if Path("results/index.html").is_file():
        print(
            "tables: results/summary.csv    page: results/index.html    pictures: results/figures/"
        )


# seconds each: they run where Snakemake runs
localrules:
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
    index,
