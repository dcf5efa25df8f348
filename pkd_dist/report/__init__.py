"""The report of a run: report.html, one self-contained file.

stage markers, config.yaml, metrics.jsonl, predictions, export manifest
    -> run.from_markers -> Run -> notices (text), charts (inline SVG) -> pages.write -> report.html
"""
