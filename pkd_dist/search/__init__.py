"""Studies: many trainings of a student on one teacher and one cache. `pkd sweep` searches; `comparison` compares methods.

    OUTPUT/teacher/        the teacher, fine-tuned once (if the configuration asks for it)
    OUTPUT/bases/*/        data and teacher cache; one for each value of the settings that they depend on
    OUTPUT/study.journal   the study: every point with its state and scores (Optuna's journal)
    OUTPUT/trials/N/       metrics.jsonl of a point; its checkpoints while it is trained
    OUTPUT/workers/        the lock of each worker, and its log
    OUTPUT/sweep.yaml      the configuration, as the workers read it
    OUTPUT/best.yaml, trials.parquet, sweep.html, final/seed-N/   what comes out

Any number of processes on any number of machines that share the folder work on one study.
"""
