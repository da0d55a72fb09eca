# A job per network; networks of a model go side by side where there are cores for it.
rule train:
    input:
        reference="results/{material}/reference.h5",
        graphs="results/{material}/graphs",
        operators=operators_of_training,
        start=first_weights,
    output:
        multiext(
            "results/{material}/networks/{model}-{network}/",
            "weights.safetensors",
            "config.json",
            "reference.h5",
            "train.csv",
        ),
    log:
        "logs/{material}/train/{model}-{network}.log",
    retries: submissions_again(CLUSTER.train_retries)
    conda:
        "../../envs/hamscale.yaml"
    threads: threads_of_training
    resources:
        # what starts one process per GPU, e.g. srun --nodes=2 --ntasks-per-node=4; a profile sets it
        launch="",
        # how these processes exchange features: torch, cupy, or either with -float16 or -bfloat16
        exchange="torch",
    params:
        file="config/models/{model}.yaml",
        settings=model_settings,
        train=graphs_of("train", "teach"),
        validation=graphs_of("validation"),
        out=output_folder,
        # no output of the rule: Snakemake deletes outputs before it tries again
        checkpoint="results/{material}/checkpoints/{model}-{network}",
    message:
        "train {wildcards.model}, network {wildcards.network}, on {wildcards.material}"
    shell:
        "OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}} {resources.launch} hamscale train {params.file} {input.reference} --train {params.train}"
        " --validation {params.validation} --operators {input.operators} --network {wildcards.network} --out {params.out}"
        " --checkpoint {params.checkpoint} --exchange {resources.exchange} > {log} 2>&1"


rule join:
    input:
        networks_of_model,
    output:
        multiext(
            "results/{material}/models/{model}/",
            "weights.safetensors",
            "config.json",
            "reference.h5",
            "train.csv",
        ),
    log:
        "logs/{material}/join/{model}.log",
    localrule: True
    conda:
        "../../envs/hamscale.yaml"
    params:
        networks=lambda w, input: [Path(p).parent for p in input],
        out=output_folder,
    message:
        "the model {wildcards.model} of {wildcards.material}"
    shell:
        "hamscale join {params.networks} --out {params.out} > {log} 2>&1"
