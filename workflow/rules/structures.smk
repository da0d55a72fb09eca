# One job per material builds all of its structures and inputs: each start of Python or CP2K's grammar costs seconds.
for MATERIAL in MATERIALS:

    rule:
        name:
            f"structures_{MATERIAL}"
        output:
            expand(
                "results/{material}/structures/{id}.extxyz",
                material=MATERIAL,
                id=MATERIALS[MATERIAL].identifiers(),
            ),
        log:
            f"logs/{MATERIAL}/structures.log",
        conda:
            "../../envs/hamscale.yaml"
        params:
            file=f"config/materials/{MATERIAL}.yaml",
            out=output_folder,
            structures=MATERIALS[MATERIAL].model_dump(mode="json")["structures"],
        message:
            f"build the structures of {MATERIAL}"
        shell:
            "hamscale structures {params.file} --out {params.out} > {log} 2>&1"

    rule:
        name:
            f"inputs_{MATERIAL}"
        input:
            expand(
                "results/{material}/structures/{id}.extxyz",
                material=MATERIAL,
                id=MATERIALS[MATERIAL].identifiers("train", "validation", "test"),
            ),
        output:
            expand(
                "results/{material}/inputs/{id}.inp",
                material=MATERIAL,
                id=MATERIALS[MATERIAL].identifiers("train", "validation", "test"),
            ),
        log:
            f"logs/{MATERIAL}/inputs.log",
        conda:
            "../../envs/hamscale.yaml"
        params:
            file=f"config/materials/{MATERIAL}.yaml",
            out=output_folder,
            dft=MATERIALS[MATERIAL].model_dump(mode="json")["dft"],
            species=MATERIALS[MATERIAL].model_dump(mode="json")["species"],
        message:
            f"write the CP2K inputs of {MATERIAL}"
        shell:
            "hamscale input {params.file} {input} --out {params.out} > {log} 2>&1"
