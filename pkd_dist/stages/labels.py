"""What people call the inputs of stages."""

LABELS = {
    "teacher.model.weights": "the weights of teacher.model",
    "teacher.tokenizer": "the teacher's tokenizer",
    "teacher.weights": "the teacher",
    "teacher.answers": "the teacher's answers",
    "student.tokenizer": "the student's tokenizer",
    "student.init.weights": "the weights of student.init",
    "data.class_names": "the class names",
    "data.training": "the training data",
    "data.vocabulary": "the tokens that the student keeps",
    "data.scale": "the scale of the targets",
    "data.outputs": "the names of the student's outputs",
    "data.tokens": "the training tokens",
    "init.weights": "the student's initial weights",
    "cache.fingerprint": "the teacher's outputs",
    "distill.weights": "the student",
    "distill.steps": "the length of the training",
    "evaluate.results": "the results",
    "export.weights": "the exported weights",
    "export.files": "the exported files",
    "export.reads": "what the model reads",
    "precision": "the training precision",
}
"""Input key -> what people call it; a key that is not here is a configuration key and is shown as it is."""


def label(key: str) -> str:
    """Return what people call an input."""
    if key.startswith("version."):
        return f"the code of the stage {key.removeprefix('version.')}"
    if key.startswith("data.") and key not in LABELS:
        return f"the {key.removeprefix('data.').replace('.', ' ')} data"
    source, _, file = key.partition(":")
    return f"{source} {file}" if file else LABELS.get(key, key)
