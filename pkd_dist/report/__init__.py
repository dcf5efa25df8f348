"""The report of a run, report.html: one self-contained file.

run.Run -> notices (text), charts (inline SVG) -> pages.write -> report.html
"""
