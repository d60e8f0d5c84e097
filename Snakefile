# Which notebook, with which parameters, reads and writes what. `make reproduce` is the door; by hand:
#     .venv/bin/snakemake --cores 2 --rerun-triggers mtime params input --config profile=mini
# Profiles differ in config/<profile>.yaml only; overlay=FILE lays another file of that form over it. All paths are relative to the working directory, so `--directory DIR`
# moves results, figures and build together. Executed notebooks are logs: a failed one is kept, a missing one is not
# a reason to run for hours again.
import fcntl
import json
import sys
from pathlib import Path

REPO = Path(workflow.basedir)
sys.path[:0] = str(REPO), str(REPO / "workflow")

import progress
import steps

from fluxlib.app import pipeline
from fluxlib.io import ConfigError, check_writable

try:
    OVERLAY = Path(config["overlay"]) if "overlay" in config else None
    PROFILE = pipeline.load(REPO / "config" / f"{config.get('profile', 'mini')}.yaml", OVERLAY)
    NAME = PROFILE.name
    RESULTS, FIGURES, BUILD = f"data/results/{NAME}", f"figures/{NAME}", f"build/{NAME}"
    for folder in (RESULTS, FIGURES, BUILD):
        check_writable(Path(folder))
except ConfigError as error:
    sys.exit(f"error: {error}")

# Snakemake's own lock outlives a process that is killed, and the same command would then be refused (make: --nolock).
if workflow.is_main_process:
    LOCK = (Path(BUILD) / ".lock").open("w")
    try:
        fcntl.flock(LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"error: another process is making {BUILD} in this folder; wait for it, or end it")

if strangers := steps.strangers(Path(RESULTS), PROFILE):
    sys.exit(
        f"error: {RESULTS} holds tables of runs that are not in config/{NAME}.yaml, which the figures would show too: "
        f"{', '.join(path.stem for path in strangers)}; move them away"
    )

NOTEBOOKS = REPO / "notebooks"
FEDERATED_RUN = NOTEBOOKS / "04_federated_run.ipynb"

# Notebooks that are executed as they stand and leave nothing but themselves.
PLAIN = ("00_start_here", "09_from_scratch", "explore")
# Study notebooks, executed once per model, and the figures that each leaves.
STUDIES = {
    "01_profiling": ["activation_by_layer", "profile_error", "sample_size", "drift", "round_saving"],
    "02_merging": [
        "discarding", "error_growth", "attention_frequency", "layer_budgets", "clustering_time", "merge_options", "own_share",
    ],
    "03_role_assignment": [
        "role_utilities", "role_probes", "role_seconds", "role_map", "role_convergence", "role_ablation", "role_coverage",
        "role_epsilon", "role_options",
    ],
    "06_scale_and_overhead": [
        "round_phases", "round_memory", "where_flux_pays", "where_flux_plus_pays", "where_lora_pays",
        "who_is_first", "link_speed", "scale_participants", "clock_check",
    ],
    "07_real_models": ["real_memory", "real_phases", "real_links"],
}
COMPARED = ["convergence", "time_to_accuracy"]
# Figures of the report, over all models.
REPORT = ["claims", "speed_up"]
# Studies that read the tables of federated runs as well, and which of their parameters name the variants they read.
READS = {
    "03_role_assignment": ("assignments", "epsilons", "options"),
    "06_scale_and_overhead": ("participants_runs", "map_runs", "plus_runs", "lora_runs"),
}
# Those of them that read all plain runs too.
READS_PLAIN = {"06_scale_and_overhead"}


def variants_read(study):
    """The variants that a study's parameters name, in lists or beside what they are called there."""
    named = [PROFILE.studies[study].get(group, []) for group in READS.get(study, ())]
    listed = [name for group in named for name in (group.values() if isinstance(group, dict) else group)]
    return [*listed, *([""] if study in READS_PLAIN else [])]


try:
    for study, parameters in PROFILE.studies.items():
        pipeline.check_parameters(NOTEBOOKS / f"{study}.ipynb", parameters)
except (ConfigError, OSError) as error:
    sys.exit(f"error: config/{NAME}.yaml, studies: {error}")

# `make figure FIG=10`: the pictures of one figure of the paper, of every model.
DRAWN = [*COMPARED, *REPORT, *(figure for study in PROFILE.studies for figure in STUDIES[study])]
PICTURES = []
if "figure" in config:
    try:
        chosen = steps.find_figure(str(config["figure"] or ""), DRAWN)
    except ConfigError as error:
        sys.exit(f"error: config/{NAME}.yaml: {error}")
    ends = [""] if chosen in REPORT else [f"-{model}" for model in PROFILE.models]
    PICTURES = [f"{FIGURES}/{chosen}{end}.png" for end in ends]
EXECUTE = f"{sys.executable} -m fluxlib.app.cli notebook"
WORK = Path.cwd()


onstart:
    where = "" if WORK == REPO else f" in {WORK}"
    shown = " ".join(PICTURES) or f"{FIGURES}/"
    end = f"Figures: {shown}   tables: {RESULTS}/   executed notebooks, logs, times: {BUILD}/{where}"
    progress.watch(workflow.dag.needrun_jobs(), workflow.cores, Path(BUILD) / "benchmarks", end)


wildcard_constraints:
    plain="|".join(PLAIN),
    run_id="|".join(map(re.escape, PROFILE.runs)),
    model="|".join(map(re.escape, PROFILE.models)),


rule all:
    input:
        expand("{build}/notebooks/{plain}.ipynb", build=BUILD, plain=PLAIN),
        expand("{results}/{table}/{run_id}.parquet",
               results=RESULTS, table=["rounds", "participants"], run_id=PROFILE.runs),
        expand("{figures}/{figure}-{model}.{kind}",
               figures=FIGURES, figure=COMPARED, model=PROFILE.models, kind=["pdf", "png", "csv"]),
        expand("{figures}/{figure}.{kind}", figures=FIGURES, figure=REPORT, kind=["pdf", "png", "csv"]),
        f"{FIGURES}/claims.md",
        *[
            f"{FIGURES}/{figure}-{model}.{kind}"
            for study in PROFILE.studies for figure in STUDIES[study] for model in PROFILE.models for kind in ("pdf", "png", "csv")
        ],


rule figure:
    input:
        PICTURES,


rule as_it_stands:
    input:
        f"{NOTEBOOKS}/{{plain}}.ipynb",
    output:
        f"{BUILD}/notebooks/{{plain}}.ipynb",
    log:
        f"{BUILD}/logs/{{plain}}.log",
    benchmark:
        f"{BUILD}/benchmarks/{{plain}}.tsv"
    shell:
        "{EXECUTE} {input} {output} > {log} 2>&1"


# Parameters decide whether a run is out of date, contents included: the notebook's code and the base model's files.
# The library's code does not (full takes hours); `--forcerun federated_run` is there for that.
# Runs are the longest steps and others wait for them: they go first, so that no core is idle at the end.
rule federated_run:
    priority: 1
    output:
        rounds=f"{RESULTS}/rounds/{{run_id}}.parquet",
        about=f"{RESULTS}/rounds/{{run_id}}.json",
        participants=f"{RESULTS}/participants/{{run_id}}.parquet",
    params:
        run=lambda wildcards: json.dumps(steps.notebook_parameters(FEDERATED_RUN, PROFILE.runs[wildcards.run_id])),
        code=steps.notebook_digest(FEDERATED_RUN),
        base=lambda wildcards: steps.model_digest(PROFILE.runs[wildcards.run_id].model),
    log:
        text=f"{BUILD}/logs/04_federated_run/{{run_id}}.log",
        notebook=f"{BUILD}/notebooks/04_federated_run-{{run_id}}.ipynb",
    benchmark:
        f"{BUILD}/benchmarks/04_federated_run/{{run_id}}.tsv"
    shell:
        "{EXECUTE} {FEDERATED_RUN} {log.notebook} --parameters {params.run:q} --set out={WORK}/{RESULTS} > {log.text} 2>&1"


for study in PROFILE.studies:

    rule:
        name: f"study_{study}"
        input:
            notebook=NOTEBOOKS / f"{study}.ipynb",
            rounds=lambda wildcards, study=study: [
                f"{RESULTS}/rounds/{run_id}.parquet"
                for run_id in pipeline.runs_read(PROFILE, wildcards.model, variants_read(study))
            ],
        output:
            table=f"{RESULTS}/measurements/{study}-{{model}}.parquet",
            about=f"{RESULTS}/measurements/{study}-{{model}}.json",
            figures=[f"{FIGURES}/{figure}-{{model}}.{kind}" for figure in STUDIES[study] for kind in ("pdf", "png", "csv")],
        params:
            settings=json.dumps(PROFILE.studies[study]),
            code=steps.notebook_digest(NOTEBOOKS / f"{study}.ipynb"),
            base=lambda wildcards: steps.model_digest(PROFILE.models[wildcards.model]),
            model=lambda wildcards: PROFILE.models[wildcards.model],
        log:
            text=f"{BUILD}/logs/{study}/{{model}}.log",
            notebook=f"{BUILD}/notebooks/{study}-{{model}}.ipynb",
        benchmark:
            f"{BUILD}/benchmarks/{study}/{{model}}.tsv"
        shell:
            "{EXECUTE} {input.notebook} {log.notebook} --parameters {params.settings:q} --set model={params.model}"
            " --set profile={NAME} --set results={WORK}/{RESULTS} --set figures_folder={WORK}/{FIGURES} > {log.text} 2>&1"


rule time_to_accuracy:
    input:
        notebook=NOTEBOOKS / "05_time_to_accuracy.ipynb",
        rounds=[f"{RESULTS}/rounds/{run_id}.parquet" for run_id, run in PROFILE.runs.items() if not run.variant],
    output:
        expand("{figures}/{figure}-{model}.{kind}",
               figures=FIGURES, figure=COMPARED, model=PROFILE.models, kind=["pdf", "png", "csv"]),
    log:
        text=f"{BUILD}/logs/05_time_to_accuracy.log",
        notebook=f"{BUILD}/notebooks/05_time_to_accuracy.ipynb",
    benchmark:
        f"{BUILD}/benchmarks/05_time_to_accuracy.tsv"
    shell:
        "{EXECUTE} {input.notebook} {log.notebook} --set profile={NAME} --set results={WORK}/{RESULTS}"
        " --set figures_folder={WORK}/{FIGURES} > {log.text} 2>&1"


rule report:
    input:
        notebook=NOTEBOOKS / "08_report.ipynb",
        rounds=expand(f"{RESULTS}/rounds/{{run_id}}.parquet", run_id=PROFILE.runs),
        studies=[f"{RESULTS}/measurements/{study}-{model}.parquet" for study in PROFILE.studies for model in PROFILE.models],
        compared=expand("{figures}/time_to_accuracy-{model}.csv", figures=FIGURES, model=PROFILE.models),
    output:
        expand("{figures}/{figure}.{kind}", figures=FIGURES, figure=REPORT, kind=["pdf", "png", "csv"]),
        f"{FIGURES}/claims.md",
    log:
        text=f"{BUILD}/logs/08_report.log",
        notebook=f"{BUILD}/notebooks/08_report.ipynb",
    benchmark:
        f"{BUILD}/benchmarks/08_report.tsv"
    shell:
        "{EXECUTE} {input.notebook} {log.notebook} --set profile={NAME} --set results={WORK}/{RESULTS}"
        " --set figures_folder={WORK}/{FIGURES} > {log.text} 2>&1"
