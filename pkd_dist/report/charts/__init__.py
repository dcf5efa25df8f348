"""Charts of a run as inline SVG: `drawing` renders them, the other modules draw one subject each."""
