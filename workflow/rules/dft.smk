# One job per run, or, with cluster.runs_per_job in the configuration, one per so many runs, which are steps of it.
if CLUSTER.runs_per_job == 1:

    rule dft:
        input:
            "results/{material}/inputs/{id}.inp",
        output:
            directory("results/{material}/dft/{id}"),
        log:
            "logs/{material}/dft/{id}.log",
        conda:
            "../../envs/cp2k.yaml"
        threads: 1
        message:
            "CP2K: {wildcards.material} {wildcards.id}"
        shell:
            "OMP_NUM_THREADS={threads} hamscale dft {input} --out {output} > {log} 2>&1"

else:

    rule dft_batch:
        input:
            lambda w: expand(
                "results/{material}/inputs/{id}.inp",
                material=w.material,
                id=batch_ids(w),
            ),
        output:
            "results/{material}/batches/{batch}.json",
        log:
            "logs/{material}/batches/{batch}.log",
        retries: submissions_again(2)
        conda:
            "../../envs/cp2k.yaml"
        resources:
            cp2k=CLUSTER.cp2k,
            at_once=CLUSTER.at_once,
        params:
            # no output of the rule: what was accepted stays when the job is killed
            store="results/{material}/runs",
        message:
            "CP2K, batch {wildcards.batch} of {wildcards.material}"
        shell:
            "HAMSCALE_CP2K='{resources.cp2k}' hamscale batch {input} --store {params.store}"
            " --at-once {resources.at_once} --out {output} > {log} 2>&1"

    rule dft:
        input:
            input="results/{material}/inputs/{id}.inp",
            record=ancient(batch_of),
        output:
            directory("results/{material}/dft/{id}"),
        log:
            "logs/{material}/dft/{id}.log",
        localrule: True
        conda:
            "../../envs/cp2k.yaml"
        params:
            store="results/{material}/runs",
        message:
            "take the run of {wildcards.material} {wildcards.id}"
        shell:
            "hamscale collect {input.input} --store {params.store} --record {input.record} --out {output} > {log} 2>&1"


rule operators:
    input:
        structure="results/{material}/structures/{id}.extxyz",
        run=run_of,
    output:
        "results/{material}/operators/{id}.h5",
    log:
        "logs/{material}/operators/{id}.log",
    conda:
        "../../envs/hamscale.yaml"
    params:
        file="config/materials/{material}.yaml",
        settings=settings_of_levels,
    message:
        "parse H and S: {wildcards.material} {wildcards.id}"
    shell:
        "hamscale operators {params.file} {input.structure} {input.run} --out {output} > {log} 2>&1"
