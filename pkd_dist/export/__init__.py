"""A trained student as files to serve it from, each verified on all of dev."""

import os

# ONNX Runtime would write an identifier of the machine to the home folder and send events to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
