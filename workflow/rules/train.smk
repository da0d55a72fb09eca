rule train:
    input:
        reference="results/{material}/reference.h5",
        train=of_split("results/{material}/graphs/{id}.h5", "train"),
        validation=of_split("results/{material}/graphs/{id}.h5", "validation"),
        operators=operators_of_training,
    output:
        "results/{material}/models/{model}/weights.safetensors",
        "results/{material}/models/{model}/config.json",
        "results/{material}/models/{model}/reference.h5",
        "results/{material}/models/{model}/train.csv",
    log:
        "logs/{material}/train/{model}.log",
    retries: submissions_again(CLUSTER.train_retries)
    conda:
        "../../envs/hamscale.yaml"
    threads: 8
    resources:
        # what starts one process per GPU, e.g. srun --nodes=2 --ntasks-per-node=4; a profile sets it
        launch="",
    params:
        file="config/models/{model}.yaml",
        settings=model_settings,
        out=output_folder,
        # no output of the rule: Snakemake deletes outputs before it tries again
        checkpoint="results/{material}/checkpoints/{model}",
    message:
        "train {wildcards.model} on {wildcards.material}"
    shell:
        "OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}} {resources.launch} hamscale train {params.file} {input.reference} --train {input.train}"
        " --validation {input.validation} --operators {input.operators} --out {params.out} --checkpoint {params.checkpoint} > {log} 2>&1"
