"""Runs to look at: pages that need nothing else, one file each.

run folder -> runs.Run -> notices (words), charts (inline SVG) -> pages -> run.html, compare.html on base.html
"""
